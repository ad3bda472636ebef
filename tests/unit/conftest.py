"""Fixtures of the unit tests."""

import functools
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from families import tiny_model


@pytest.fixture(scope="session")
def model_of() -> Callable[..., PreTrainedModel]:
    """`tiny_model`, each model made once: whoever changes one must ask for a model of their own."""
    return functools.cache(tiny_model)
