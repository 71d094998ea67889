"""How good a click-rate model is on held-out rows: the figures of metrics.json and two plots beside it.

Rates are the observed ones, which carry the noise of finite impressions, so even a perfect model has errors. Left out:
confidence intervals, and how the model was trained.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlhf.rewards.ctr.model import Product, binomial_loss


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions for N rows and what was observed; tensors are (N,)."""

    logit: Tensor
    rate: Tensor
    """Observed click rate in [0, 1]."""
    impressions: Tensor
    """Views behind each rate; 0 where unknown."""
    products: Sequence[Product]

    @property
    def predicted(self) -> Tensor:
        """Predicted click rate in (0, 1), float64."""
        return self.logit.double().sigmoid()

    @property
    def counted(self) -> bool:
        """Whether the impressions of every row are known."""
        return bool((self.impressions > 0).all())


def calibration(predictions: Predictions, bins: int = 10) -> tuple[Tensor, Tensor, Tensor, float]:
    """(predicted, observed, weight, error) of the rows in order of their prediction, in bins of equal count.

    (bins,) in float64: mean rates of a bin, weighted by impressions where all are known, and its impressions, else its rows.
    The expected calibration error is the mean over the bins, by weight, of |predicted − observed|. Bins differ by one row at
    most; fewer rows than bins: one row a bin.
    """
    order = predictions.predicted.argsort(stable=True)
    each = predictions.impressions.double() if predictions.counted else torch.ones(len(order), dtype=torch.double)
    parts = torch.tensor_split(order, min(bins, len(order)))
    weight, predicted, observed = (
        torch.stack([(each[part] * values[part]).sum() for part in parts])
        for values in (torch.ones_like(each), predictions.predicted, predictions.rate.double())
    )
    predicted, observed = predicted / weight, observed / weight
    return predicted, observed, weight, ((weight / weight.sum()) * (predicted - observed).abs()).sum().item()


def metrics(predictions: Predictions) -> dict[str, float]:
    """The figures of metrics.json; one that is not defined for these rows is left out.

    correlation, rank_correlation: Pearson's, of rates and of ranks (ties share their mean rank). mae, mse: of rates.
    pair_accuracy: share of `pairs` in which the picture with the higher rate is also predicted higher. binomial_loss:
    negative log-likelihood per impression, where impressions are known.
    """
    predicted, rate = predictions.predicted, predictions.rate.double()
    accuracy, pairs = pair_accuracy(predicted, rate, predictions.products)
    values = {
        "rows": float(len(rate)),
        "correlation": _correlation(predicted, rate),
        "rank_correlation": _correlation(_ranks(predicted), _ranks(rate)),
        "mae": (predicted - rate).abs().mean().item(),
        "mse": (predicted - rate).square().mean().item(),
        "calibration_error": calibration(predictions)[-1],
        "pair_accuracy": accuracy,
        "pairs": float(pairs),
    }
    if predictions.counted:
        views = predictions.impressions.double()
        values["binomial_loss"] = binomial_loss(predictions.logit.double(), rate, views).item()
    return {name: value for name, value in values.items() if math.isfinite(value)}


def pair_accuracy(
    predicted: Tensor, rate: Tensor, products: Sequence[Product], difference: float = 0.03
) -> tuple[float, int]:
    """(share in the right order, number) of the pairs of rows of one product whose rates differ by three points or more.

    Equal predictions count one half. No such pair: (nan, 0).
    """
    rows = defaultdict(list)
    for index, product in enumerate(products):
        rows[product].append(index)
    pairs = torch.cat([torch.combinations(torch.tensor(group)) for group in rows.values()])
    first, second = pairs.unbind(1)
    actual = rate[first] - rate[second]
    enough = actual.abs() >= difference - 1e-6  # in floats 0.32 − 0.29 is a little less than 0.03
    guess = (predicted[first] - predicted[second])[enough] * actual[enough].sign()
    right = (guess > 0).double() + 0.5 * (guess == 0).double()
    return right.mean().item(), int(enough.sum())


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[group]


def write_plots(folder: Path, predictions: Predictions) -> None:
    """Two pictures in `folder`. Needs no display."""
    _calibration_plot(predictions).savefig(folder / "calibration.png")
    _predicted_plot(predictions).savefig(folder / "predicted_vs_actual.png")


def _calibration_plot(predictions: Predictions) -> Figure:
    predicted, observed, weight, off = calibration(predictions)
    counted = predictions.counted
    noise = 196 * (observed * (1 - observed) / weight).sqrt() if counted else None
    predicted, observed = 100 * predicted, 100 * observed
    label = f"{len(predicted)} bins of equal count" + (", 95 % of binomial noise" if counted else "")
    title = f"Calibration on {len(predictions.rate)} held-out rows\nexpected calibration error {100 * off:.2f} points"
    title += ", weighted by impressions" if counted else ""
    figure = Figure(figsize=(6, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _identity(above, predicted, observed)
    above.errorbar(predicted, observed, yerr=noise, fmt="o-", color="tab:blue", capsize=3, lw=1.2, label=label)
    above.set(ylabel="observed click rate (%)", title=title)
    above.legend(loc="upper left")
    below.vlines(predicted, 0, weight / 1000 if counted else weight, color="tab:blue", lw=6, alpha=0.6)
    below.set(ylim=(0, None), xlabel="predicted click rate (%)")
    below.set_ylabel("impressions\n(thousands)" if counted else "rows")
    below.yaxis.set_major_locator(MaxNLocator(4))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def _predicted_plot(predictions: Predictions) -> Figure:
    figures = metrics(predictions)
    predicted, rate = 100 * predictions.predicted, 100 * predictions.rate.double()
    title = f"Predicted and observed on {len(rate)} held-out rows\n"
    if "correlation" in figures:
        title += f"correlation {figures['correlation']:.3f}, "
    title += f"mean absolute error {100 * figures['mae']:.2f} points"
    if figures["pairs"]:
        title += f"\n{100 * figures['pair_accuracy']:.1f} % of {figures['pairs']:.0f} within-product pairs in order"
    figure = Figure(figsize=(6.6, 6.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    _identity(axes, predicted, rate)
    if predictions.counted:
        views = predictions.impressions.double()
        points = axes.scatter(predicted, rate, c=views, norm=LogNorm(), s=18, alpha=0.75, cmap="viridis")
        bar = figure.colorbar(points, ax=axes, label="impressions")
        steps = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
        bar.set_ticks([step for step in steps if views.min() <= step <= views.max()])
        bar.minorticks_off()
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.scatter(predicted, rate, color="tab:blue", s=18, alpha=0.6)
    axes.set(xlabel="predicted click rate (%)", ylabel="observed click rate (%)", title=title)
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def _identity(axes: Axes, x: Tensor, y: Tensor) -> None:
    """The line of perfect predictions, over the same range on both axes."""
    limit = 1.05 * max(x.max().item(), y.max().item())
    axes.plot([0, limit], [0, limit], "--", color="gray", lw=1, label="perfect: observed = predicted")
    axes.set(xlim=(0, limit), ylim=(0, limit))
