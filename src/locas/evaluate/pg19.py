"""PG-19 (arXiv:1911.05507) from the Hugging Face hub, or from a folder in the same layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from locas.text import Document, one_paragraph_a_line, reflow

SOURCE = "emozilla/pg19"  # the books as parquet files; the original's loading script is no longer run
SPLITS = ("test", "validation", "train")


def pg19(split: str, *, source: str = SOURCE, max_books: int | None = None, unwrap: bool = False) -> list[Document]:
    """The books of one split, in the dataset's order.

    Args:
        split: test, validation or train.
        source: a dataset's name on the hub, or a folder.
        max_books: only so many of the first ones.
        unwrap: join hard-wrapped lines, one paragraph a line.

    Raises:
        ValueError: no such split, `datasets` is not installed, or the dataset could not be loaded.
    """
    if split not in SPLITS:
        raise ValueError(f"PG-19 has no split {split!r}; it has {', '.join(SPLITS)}")
    if max_books is not None and max_books < 1:
        return []
    try:
        import datasets
    except ImportError as error:
        raise ValueError("PG-19 is loaded by `datasets`, which is not installed: pip install datasets") from error
    try:
        rows = islice(datasets.load_dataset(source, split=split, streaming=True), max_books)
        return from_rows(rows, unwrap=unwrap)
    except Exception as error:  # what it calls raises nearly everything
        raise ValueError(f"PG-19 could not be loaded from {source!r}: {error}") from error


def from_rows(rows: Iterable[Mapping[str, Any]], *, unwrap: bool = False) -> list[Document]:
    """Documents from rows with a `text`, and a `short_book_title` or a `url` to be named by."""
    documents: list[Document] = []
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        text = str(row["text"]).replace("\r\n", "\n")
        text = one_paragraph_a_line(reflow(text)) if unwrap else text
        name = str(row.get("short_book_title") or row.get("url") or f"book {i}")
        seen[name] = seen.get(name, 0) + 1
        name += f" ({seen[name]})" if seen[name] > 1 else ""
        documents.append(Document(name, text, "utf-8", hashlib.sha256(text.encode()).hexdigest()))
    return documents
