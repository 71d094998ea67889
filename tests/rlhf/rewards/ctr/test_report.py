"""Figures with known answers, and plots that are there and not empty."""

import math

import pytest
import torch
from PIL import Image

from rlhf.rewards.ctr.model import Product
from rlhf.rewards.ctr.report import (
    Predictions,
    calibration,
    metrics,
    pair_accuracy,
    write_plots,
)

A = Product(food_name="a", food_type="t", city_name="c", shop_name="s")
B = Product(food_name="b", food_type="t", city_name="c", shop_name="s")


def said(predicted, rate, impressions=None, products=None):
    predicted, rate = torch.tensor(predicted), torch.tensor(rate)
    views = torch.zeros(len(rate)) if impressions is None else torch.tensor(impressions)
    return Predictions(
        logit=predicted.logit(),
        rate=rate,
        impressions=views,
        products=[A] * len(rate) if products is None else products,
    )


def test_correlations_and_errors_by_hand():
    found = metrics(said([0.1, 0.2, 0.3, 0.5], [0.1, 0.3, 0.2, 0.9]))
    # means 0.275 and 0.375: Σ products of deviations 0.1675, of squares 0.0875 and 0.3875
    assert found["correlation"] == pytest.approx(0.1675 / math.sqrt(0.0875 * 0.3875), rel=1e-5)
    assert found["rank_correlation"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))
    assert found["mae"] == pytest.approx((0 + 0.1 + 0.1 + 0.4) / 4, rel=1e-5)
    assert found["mse"] == pytest.approx((0.01 + 0.01 + 0.16) / 4, rel=1e-5)
    assert found["rows"] == 4 and "binomial_loss" not in found


def test_ties_share_their_mean_rank():
    found = metrics(said([0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 1.0]))
    # ranks 1 2 3 4 against 1 2.5 2.5 4: covariance 4.5, variances 5 and 4.5
    assert found["rank_correlation"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_calibration_error_weighs_bins_by_impressions():
    predictions = said([0.1, 0.1, 0.4, 0.4], [0.2, 0.4, 0.4, 0.4], [100.0, 300.0, 100.0, 100.0])
    _, observed, weight, error = calibration(predictions, bins=2)
    torch.testing.assert_close(observed, torch.tensor([(100 * 0.2 + 300 * 0.4) / 400, 0.4]).double())
    assert weight.tolist() == [400, 200]
    assert error == pytest.approx(400 / 600 * 0.25, abs=1e-6)
    _, _, weight, error = calibration(said([0.1, 0.1, 0.4, 0.4], [0.2, 0.4, 0.4, 0.4]), bins=2)
    assert weight.tolist() == [2, 2] and error == pytest.approx(0.5 * 0.2, abs=1e-6)


def test_bins_have_equal_counts_in_order_of_the_prediction():
    rates = torch.rand(103, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    predicted, _, weight, error = calibration(said(rates.tolist(), rates.tolist()))
    assert sorted(weight.tolist()) == [10.0] * 7 + [11.0] * 3
    assert predicted.diff().min() > 0 and error == pytest.approx(0, abs=1e-6)
    assert len(calibration(said([0.1, 0.2], [0.1, 0.2]))[2]) == 2


def test_pairs_are_of_one_product_and_differ_by_three_points():
    rate = torch.tensor([0.02, 0.05, 0.30, 0.04, 0.06]).double()
    predicted = torch.tensor([0.10, 0.20, 0.15, 0.9, 0.1]).double()
    products = [A, A, A, B, B]  # B's two differ by two points only
    accuracy, pairs = pair_accuracy(predicted, rate, products)
    assert pairs == 3 and accuracy == pytest.approx(2 / 3)
    assert pair_accuracy(predicted, rate, products, difference=0.01) == (pytest.approx(2 / 4), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_points_are_enough_whatever_floats_make_of_them(dtype):
    for hundredths in range(0, 90):
        rate = torch.tensor([hundredths / 100, (hundredths + 3) / 100, (hundredths + 5.99) / 100], dtype=dtype)
        assert pair_accuracy(rate.double(), rate.double(), [A, A, A]) == (1.0, 2)


def test_an_equal_prediction_counts_one_half():
    rate = torch.tensor([0.1, 0.5]).double()
    assert pair_accuracy(torch.tensor([0.2, 0.2]), rate, [A, A]) == (0.5, 1)


def test_what_is_not_defined_is_left_out():
    found = metrics(said([0.1, 0.2], [0.3, 0.3], products=[A, B]))
    assert not {"correlation", "rank_correlation", "pair_accuracy"} & found.keys() and found["pairs"] == 0
    assert all(map(math.isfinite, found.values()))
    assert metrics(said([0.1], [0.3]))["mae"] == pytest.approx(0.2)


def test_binomial_loss_is_that_of_torch():
    predictions = said([0.1, 0.7], [0.2, 0.5], [50.0, 10.0])
    law = torch.distributions.Binomial(predictions.impressions, probs=predictions.predicted.float())
    clicks = predictions.rate * predictions.impressions
    coefficients = torch.lgamma(torch.tensor([51.0, 11])) - torch.lgamma(clicks + 1)
    coefficients -= torch.lgamma(predictions.impressions - clicks + 1)
    expected = -(law.log_prob(clicks) - coefficients).sum() / 60
    assert metrics(predictions)["binomial_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("counted", [True, False])
def test_plots_are_written_and_show_something(tmp_path, counted):
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(60, generator=generator) * 0.5 + 0.01
    rate = (predicted + 0.05 * torch.randn(60, generator=generator)).clamp(0, 1)
    views = (torch.rand(60, generator=generator) * 1000 + 10).tolist() if counted else None
    write_plots(tmp_path, said(predicted.tolist(), rate.tolist(), views, [A, B] * 30))
    for name in ("calibration.png", "predicted_vs_actual.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) >= 600
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 20


def test_one_row_can_be_plotted(tmp_path):
    write_plots(tmp_path, said([0.1], [0.3]))
