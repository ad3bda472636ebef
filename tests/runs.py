"""Short runs over made-up texts."""

import hashlib
import json
from typing import Any

from helpers import text
from locas.backbone import Backbone
from locas.initialise import InitSettings
from locas.run import Run
from locas.run_settings import RunSettings, Text
from locas.stream import ReadSettings
from locas.write import WriteSettings
from tokens import words

SETTINGS = RunSettings(
    init=InitSettings(rank=3, init="paper", tau_scale=8.0),
    read=ReadSettings(window=29, chunk=11, write=WriteSettings(lr=0.1)),
)
LENGTHS = (23, 31, 11)
N_CHUNKS = 3 + 3 + 1


def make_text(backbone: Backbone, n_tokens: int, seed: int) -> Text:
    string = words(text(n_tokens, seed=seed))
    ids, n_bytes = backbone.encode(string)
    return Text(f"{seed}.txt", ids, n_bytes, hashlib.sha256(string.encode()).hexdigest())


def three_texts(backbone: Backbone) -> list[Text]:
    return [make_text(backbone, n, seed) for seed, n in enumerate(LENGTHS)]


def run_to_end(run: Run) -> tuple[bytes, dict[str, Any]]:
    """The finished file, and the figures but for the time that they took."""
    for _ in run:
        pass
    run.finish()
    results = json.loads(json.dumps(run.results()))
    assert results.pop("seconds") >= 0
    assert results.pop("memory") == str(run.output)
    if "baseline" in results:
        assert results["baseline"].pop("seconds") >= 0
    return run.output.read_bytes(), results
