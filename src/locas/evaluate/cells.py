"""Results cell by cell in one JSON file, so that an evaluation that was stopped goes on where it was.

A cell is named by a hash of everything that it depends on: other settings make other cells, never wrong ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from locas._version import __version__
from locas.backbone import Backbone
from locas.evaluate.provenance import weights_sha256
from locas.store import write_atomically

_FORMAT = "locas-cells"


class Cells:
    """What was measured so far. path: the file; it is read now, and written after every new cell.

    Raises:
        ValueError: the file is damaged, or something else; nothing was changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._cells: dict[str, Any] = {}
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                if found["format"] != _FORMAT or not isinstance(found["cells"], dict):
                    raise ValueError(f"its format is {found['format']!r}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} does not hold results of an evaluation ({error!r}); move it away, or choose another "
                    "-o. Nothing was changed."
                ) from error
            self._cells = found["cells"]

    def __contains__(self, key: str) -> bool:
        return key in self._cells

    def __getitem__(self, key: str) -> Any:
        return self._cells[key]

    def put(self, key: str, value: Any) -> None:
        """Keeps a result; it is on the disk when this returns. NaN and infinity become null."""
        self._cells[key] = finite(value)
        write_atomically(self.path, json.dumps({"format": _FORMAT, "cells": self._cells}, allow_nan=False).encode())

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The cell, made now if it is not there yet."""
        if key not in self:
            self.put(key, make())
        return self[key]


def key_of(**what: Any) -> str:
    """A name for everything that `what` says, and this version of locas."""
    text = json.dumps(what | {"locas": __version__}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(backbone: Backbone) -> dict[str, Any]:
    """What of a backbone a measurement depends on."""
    return {
        "weights": weights_sha256(backbone.model),
        "tokenizer": backbone.tokenizer_sha256,
        "dtype": str(next(backbone.model.parameters()).dtype),
        "start_id": backbone.start_id,
        "start_in_every_window": backbone.start_in_every_window,
    }


def finite(value: Any) -> Any:
    """A copy in which NaN and infinite numbers are None, as JSON knows neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
