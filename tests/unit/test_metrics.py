"""Perplexity and bits per byte, worked out by hand."""

import math

import pytest
import torch

from locas.metrics import Score

NAN = math.nan


def test_perplexity_is_what_a_fair_die_gives() -> None:
    score = Score.of(torch.full((7,), math.log(6.0), dtype=torch.float64), n_bytes=14)
    assert score == Score(7, 14, pytest.approx(7 * math.log(6)))
    assert score.perplexity == pytest.approx(6, rel=1e-12)
    assert score.bits_per_byte == pytest.approx(math.log2(6) / 2, rel=1e-12)


def test_perplexity_is_the_geometric_mean_of_1_over_p() -> None:
    score = Score.of(torch.tensor([0.5, 0.125], dtype=torch.float64).log().neg(), n_bytes=1)
    assert score.nll == pytest.approx(math.log(16), rel=1e-12)
    assert score.perplexity == pytest.approx(4, rel=1e-12)
    assert score.bits_per_byte == pytest.approx(4, rel=1e-12)  # 1 + 3 bits, 1 byte


def test_what_was_not_scored_is_left_out_of_tokens_and_loss_but_not_of_bytes() -> None:
    score = Score.of(torch.tensor([NAN, 1.0, NAN, 2.0]), n_bytes=8)
    assert score == Score(2, 8, 3.0)
    assert score.perplexity == pytest.approx(math.exp(1.5), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(3 / math.log(2) / 8, rel=1e-12)


def test_losses_of_zero() -> None:
    assert Score.of(torch.zeros(3), 5).perplexity == 1.0
    assert Score.of(torch.zeros(3), 5).bits_per_byte == 0.0


def test_scores_add_up_as_texts_do() -> None:
    one, other = Score(2, 3, 5.0), Score(7, 11, 13.0)
    assert one + other == Score(9, 14, 18.0)
    assert (one + other).perplexity == pytest.approx(math.exp(2), rel=1e-12)
    assert one + Score(0, 0, 0.0) == one


@pytest.mark.parametrize("losses", [[], [NAN], [NAN, NAN]])
def test_nothing_scored(losses: list[float]) -> None:
    score = Score.of(torch.tensor(losses), 0)
    assert (score.tokens, score.n_bytes, score.nll) == (0, 0, 0.0)
    assert math.isnan(score.perplexity)
    assert math.isnan(score.bits_per_byte)


def test_the_sum_is_exact_where_float32_would_stop_counting() -> None:
    losses = torch.full((1001,), 0.1)
    losses[0] = 2.0**24
    assert Score.of(losses, 1).nll == pytest.approx(2.0**24 + 1000 * float(losses[1]), rel=1e-15)


def test_a_hopeless_text_has_a_finite_perplexity() -> None:
    assert math.isfinite(Score(1, 1, 1e6).perplexity)
