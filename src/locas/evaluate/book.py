"""Books as a backbone's tokenizer sees them, and methods as they are asked for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.evaluate.learners import Option
from locas.store import load_tensors, save_tensors
from locas.text import Document

TEXT_FORMAT = "locas-text"


@dataclass(frozen=True)
class Method:
    """A method with options, as it was asked for: label "locas:rank=8" is `locas` at rank 8."""

    label: str
    name: str
    options: dict[str, Option] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Method:
        """From "locas" or "locas:rank=8:lr=0.05". Raises ValueError where an option is not NAME=VALUE."""
        name, *given = text.strip().split(":")
        return Method(text.strip(), name, dict(_option(text, part) for part in given))


@dataclass(frozen=True)
class Book:
    """A tokenized text.

    Attributes:
        name: unique within a run.
        ids: [n] int64.
        ends: [n] int64, UTF-8 bytes of the text up to the end of each token.
        text: in UTF-8, as far as the tokens go.
        sha256: of the whole text.
    """

    name: str
    ids: Tensor
    ends: Tensor
    text: bytes
    sha256: str

    @staticmethod
    def of(document: Document, backbone: Backbone, max_tokens: int | None = None) -> Book:
        """A document as the backbone's tokenizer sees it, or its first `max_tokens` tokens."""
        ids, n_bytes = backbone.encode(document.text, max_tokens)
        ends = _token_ends(document.text, ids, backbone.tokenizer)
        ends[-1] = n_bytes
        return Book(document.name, ids, ends.clamp(max=n_bytes), document.text.encode()[:n_bytes], document.sha256)

    @property
    def ids_sha256(self) -> str:
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def save_text(path: Path, book: Book) -> None:
    """Keeps a book's text and tokens beside its losses, for the report."""
    if not path.exists():
        tensors = {"ends": book.ends, "text": torch.frombuffer(bytearray(book.text), dtype=torch.uint8)}
        save_tensors(
            path, tensors, {"format": TEXT_FORMAT, "version": 1, "book": book.name, "text_sha256": book.sha256}
        )


def load_text(path: Path) -> tuple[bytes, Tensor]:
    """(text in UTF-8, [n] where each token ends in it). Raises ValueError if the file is damaged."""
    tensors, _ = load_tensors(path, kind=TEXT_FORMAT)
    return tensors["text"].numpy().tobytes(), tensors["ends"]


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text).strip("._") or "x"


def _token_ends(text: str, ids: Tensor, tokenizer: Any) -> Tensor:
    """[n] UTF-8 bytes up to the end of each token; with a slow tokenizer by the length of what each one decodes to."""
    if not getattr(tokenizer, "is_fast", False):
        lengths = [len(tokenizer.decode([i]).encode()) for i in ids.tolist()]
        return torch.tensor(lengths).cumsum(0)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    stops = np.asarray([stop for _, stop in encoded["offset_mapping"][: ids.numel()]], dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(sizes)])
    return torch.from_numpy(np.maximum.accumulate(before[stops]))


def _option(method: str, text: str) -> tuple[str, Option]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"the option {text!r} in {method!r} is not understood; write it as rank=16")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    if value.lower() == "none":
        return key, None
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
