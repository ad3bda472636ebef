"""Statistics of an evaluation, worked out by hand."""

import math

import numpy as np
import pytest
import torch

from locas.evaluate.statistics import binned, cut, paired, paired_bootstrap, perplexities

NAN = math.nan


def test_perplexity_by_both_definitions() -> None:
    # Chunks of two and of one token, probabilities 1/2, 1/8 and 1/16: geometric mean 1/4, then 1/16.
    nll = torch.tensor([2.0, 8.0, 16.0], dtype=torch.float64).log()
    plain, chunked = perplexities(nll, [2, 3])
    assert plain == pytest.approx(256 ** (1 / 3), rel=1e-12)
    assert chunked == pytest.approx((2 * 4 + 1 * 16) / 3, rel=1e-12)


def test_tokens_that_were_not_scored_weigh_nothing() -> None:
    nll = torch.tensor([NAN, math.log(3), NAN, math.log(9)], dtype=torch.float64)
    assert perplexities(nll, [2, 4]) == pytest.approx((math.sqrt(27), (3 + 9) / 2), rel=1e-12)
    assert perplexities(nll, [1, 4])[1] == pytest.approx(math.sqrt(27), rel=1e-12)
    assert all(math.isnan(x) for x in perplexities(nll[:1], [1]))


def test_the_mean_of_chunks_is_never_smaller() -> None:
    nll = torch.rand(97, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    plain, chunked = perplexities(nll, [13, 31, 64, 97])
    assert plain < chunked
    assert perplexities(nll, [97]) == pytest.approx((plain, plain), rel=1e-12)


@pytest.mark.parametrize("stops", [[], [2], [2, 2, 3], [3, 2], [4]])
def test_chunks_that_do_not_cover_the_losses_are_refused(stops: list[int]) -> None:
    with pytest.raises(ValueError, match="do not cover 3 losses"):
        perplexities(torch.zeros(3), stops)


def test_a_cut_ends_the_last_chunk_early() -> None:
    assert cut([4, 8, 12], 8) == [4, 8]
    assert cut([4, 8, 12], 9) == [4, 8, 9]
    assert cut([4, 8, 12], 3) == [3]


def test_the_interval_of_two_values_is_known() -> None:
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    assert paired_bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert paired_bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_the_normal_distribution_where_values_are_many() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = paired_bootstrap(values.tolist())
    error = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.02)


def test_the_interval_is_the_same_every_time_and_depends_on_its_seed() -> None:
    values = [0.3, -0.1, 0.8, 0.05, -0.4]
    assert paired_bootstrap(values) == paired_bootstrap(values)
    assert paired_bootstrap(values, seed=1, resamples=50) != paired_bootstrap(values, seed=2, resamples=50)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    mean, low, high = paired_bootstrap([0.25])
    assert mean == 0.25
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(ValueError, match="no differences"):
        paired_bootstrap([])
    with pytest.raises(ValueError, match="must be finite"):
        paired_bootstrap([1.0, NAN])


def test_pairs_are_taken_book_by_book() -> None:
    ours = {"a": 1.5, "b": 1.0, "c": 3.0}
    theirs = {"b": 1.25, "a": 1.25, "d": 9.0}
    found = paired(ours, theirs)
    assert found.differences == {"a": 0.25, "b": -0.25}
    assert found.interval.mean == 0.0
    assert found.better == 1
    # A constant difference has no spread, however different the books are.
    same = paired({k: v + 0.5 for k, v in ours.items()}, ours)
    assert same.interval == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no book is in both"):
        paired({"a": 1.0}, {"b": 1.0})


def test_bins_cover_everything_once() -> None:
    ends, means = binned(torch.tensor([1.0, 2.0, 3.0, 4.0, NAN, 6.0, 7.0]), 3)
    assert ends == [2, 5, 7]
    assert means == [1.5, 3.5, 6.5]
    assert binned(torch.tensor([5.0, 7.0]), 9) == ([1, 2], [5.0, 7.0])
