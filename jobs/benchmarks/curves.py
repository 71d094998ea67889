"""Learning curves of several runs in one picture, a colour per way of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
"""(step, what was measured)."""
COLORS = ("tab:green", "tab:gray", "tab:red")


def plot(curves: Mapping[Any, Sequence[Curve]], out: Path, *, legend: str, measure: str, title: str) -> None:
    """A PNG. `legend` says what tells the runs apart, `measure` what the curves show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for color, (way, runs) in zip(COLORS, curves.items(), strict=False):
        for number, run in enumerate(runs):
            axes.plot(*zip(*run, strict=True), color=color, label=None if number else way)
    axes.set(xlabel="step", ylabel=measure, title=title)
    axes.legend(title=legend)
    figure.savefig(out, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
