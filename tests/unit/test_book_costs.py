"""What `eval books` says of time and memory: worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from locas import InitSettings, ReadSettings, WriteSettings
from locas.evaluate.books import _fullest, relative_time
from locas.evaluate.learners import Setup
from locas.evaluate.memory_use import peak_bytes

NAN = math.nan
NO_MEMORY = Setup("truncation", ReadSettings())
CURVED = Setup("locas", ReadSettings(write=WriteSettings(damping=0.1, damping_every=5)), InitSettings())
PLAIN = Setup("locas-recomputed", ReadSettings(write=WriteSettings()), InitSettings())


def tensors(seconds: list[float], stops: list[int], reference: list[tuple[float, float]]) -> dict[str, torch.Tensor]:
    return {
        "seconds": torch.tensor(seconds, dtype=torch.float64),
        "stops": torch.tensor(stops),
        "reference_seconds": torch.tensor([s for s, _ in reference], dtype=torch.float64),
        "reference_tokens": torch.tensor([t for _, t in reference], dtype=torch.float64),
    }


def test_a_chunk_that_is_timed_stands_for_those_before_it_too() -> None:
    # Chunks 1 and 4 are timed, 2 and 3 of them alone: 1 stands for two chunks, 4 for three.
    seconds = [90.0, 3.0, 50.0, 50.0, 6.0, 50.0]
    reference = [(NAN, NAN), (2.0, 10.0), (NAN, NAN), (NAN, NAN), (1.0, 10.0), (NAN, NAN)]
    expected = ((2 * 3.0 + 3 * 6.0) / 50) / ((2 * 2.0 + 3 * 1.0) / 50)
    assert relative_time(tensors(seconds, [10, 20, 30, 40, 50, 60], reference)) == pytest.approx(expected, rel=1e-12)


def test_time_is_per_token_where_chunks_differ_in_length() -> None:
    # A method whose chunks are half as long: 1 s for 5 tokens, truncated reading 1 s for 10.
    found = relative_time(tensors([9.0, 1.0, 1.0], [5, 10, 15], [(NAN, NAN), (1.0, 10.0), (1.0, 10.0)]))
    assert found == pytest.approx(2.0, rel=1e-12)


def test_nothing_timed_is_no_figure() -> None:
    assert math.isnan(relative_time(tensors([1.0, 2.0], [5, 10], [(NAN, NAN), (NAN, NAN)])))


@pytest.mark.parametrize(
    ("setup", "window", "chunk", "whole", "expected"),
    [
        (NO_MEMORY, 64, 32, 100, 3),  # the window holds two chunks, kept context a part of a third
        (NO_MEMORY, 64, 30, 100, 4),
        (NO_MEMORY, 64, 32, 3, 2),  # too short: the last whole chunk
        (NO_MEMORY, 64, 32, 0, 0),
        (PLAIN, 64, 4, 100, 17),
        (CURVED, 64, 32, 100, 3),  # the first ten writes make the metric anew
        (CURVED, 64, 4, 100, 20),  # then every fifth
        (CURVED, 64, 4, 19, 18),
    ],
)
def test_memory_is_measured_where_the_window_is_full_and_the_metric_made_anew(
    setup: Setup, window: int, chunk: int, whole: int, expected: int
) -> None:
    assert _fullest(setup, window, chunk, whole) == expected


def test_peak_memory_counts_what_is_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def work() -> str:
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        kept.append(b @ b)
        return "done"

    result, peak = peak_bytes(work, torch.device("cpu"))
    assert result == "done"
    assert 8_000_000 <= peak < 8_100_000  # two of the three at a time
