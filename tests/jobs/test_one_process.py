"""The plot of learning curves: every run is drawn, in the colour of its way of training."""

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from jobs.one_process import COLORS, plot


def test_every_way_of_training_is_drawn_in_its_colour(tmp_path):
    curves = {"true": [[(0, 0.0), (10, 1.0)]], "shuffled": [[(0, 0.0), (10, 0.1)], [(0, 0.0), (10, -0.1)]]}
    plot(curves, tmp_path / "curves.png", legend="labels", measure="accuracy", title="A title")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    drawn = [int((pixels == np.round(np.array(to_rgb(color)) * 255)).all(axis=-1).sum()) for color in COLORS]
    assert drawn[0] > 300 and drawn[1] > 300 and drawn[2] == 0, drawn
