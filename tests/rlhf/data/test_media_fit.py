"""Fitting pictures into a frame."""

import numpy as np
import pytest
from PIL import Image

from rlhf.data.media import fit_image
from tests.rlhf.data import photos


def halves(height: int, width: int, axis: int) -> np.ndarray:
    """Red, then blue, split in the middle of an axis."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 255
    half = (slice(None),) * axis + (slice((height, width)[axis] // 2, None),)
    image[half] = (0, 0, 255)
    return image


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_right_size_is_unchanged(fit):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(image, 32, 48, fit), image)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (16, 128), (33, 7), (500, 20)])
def test_every_fit_gives_the_size(fit, size):
    image = fit_image(halves(*size, axis=0), 48, 32, fit)
    assert image.shape == (48, 32, 3) and image.dtype == np.uint8


def test_crop_cuts_evenly_and_keeps_the_aspect():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 255
    assert (fit_image(image, 40, 40, "crop") == 255).all()
    cropped = fit_image(halves(100, 40, axis=0), 40, 40, "crop").astype(int)
    assert (cropped[:18, :, 0] > 250).all() and (cropped[22:, :, 2] > 250).all()


def test_pad_shows_everything_on_white():
    padded = fit_image(halves(20, 40, axis=1), 40, 40, "pad")
    assert (padded[:10] == 255).all() and (padded[30:] == 255).all()
    assert (padded[10:30, :18] == (255, 0, 0)).all() and (padded[10:30, 22:] == (0, 0, 255)).all()


def test_stretch_fills_the_frame_with_everything():
    stretched = fit_image(halves(20, 40, axis=1), 40, 40, "stretch")
    assert (stretched[:, :18, 0] > 250).all() and (stretched[:, 22:, 2] > 250).all()


def test_an_unknown_fit_is_an_error():
    with pytest.raises(ValueError, match=r"data.fit = 'zoom'; use crop, pad or stretch"):
        fit_image(halves(20, 40, axis=1), 40, 40, "zoom")


def test_load_reads_a_file(tmp_path):
    Image.fromarray(halves(20, 40, axis=1)).save(tmp_path / "a.png")
    assert np.array_equal(photos.load(tmp_path / "a.png", 20, 40, "crop"), halves(20, 40, axis=1))
