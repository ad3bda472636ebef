"""How much of each evaluation book stands in the training text: distinct 13-grams of words in common.

Words are lower-cased runs of letters and digits, so that wraps, quotes and dashes do not matter. The evaluation books'
13-grams are hashed to 64 bits and kept, the training text streams past them book by book.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locas.text import decode, strip_gutenberg
from pretrain.books import Book

N_WORDS = 13
# A training book is dropped if it holds more than this share of an evaluation book's 13-grams, or if more than this
# share of its own 13-grams stands in the evaluation books. Most quotations stay under it; the same work does not.
THRESHOLD = 0.001
# So many may be shared with whatever book: of a short one, a thousandth is a sentence.
_MIN_GRAMS = 20

_WORD = re.compile(r"[a-z0-9]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CACHE_WORDS = 1_000_000


@dataclass(frozen=True)
class Overlap:
    """One training book against the evaluation books.

    Attributes:
        source: the training book.
        title: its first line.
        grams: its distinct 13-grams.
        shared: those of them that stand in any evaluation book.
        worst: the evaluation book of which it holds the largest share.
        worst_grams: distinct 13-grams in common with that one.
        worst_share: the same as a share of the evaluation book's 13-grams.
    """

    source: str
    title: str
    grams: int
    shared: int
    worst: str
    worst_grams: int
    worst_share: float

    @property
    def drop(self) -> bool:
        """Whether the book must not be trained on."""
        share = self.shared / self.grams if self.grams else 0.0
        return self.shared >= _MIN_GRAMS and max(share, self.worst_share) > THRESHOLD


class Hasher:
    """Texts to hashes of their 13-grams; a word's own hash is remembered, since texts repeat their words."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}

    def grams(self, text: str) -> NDArray[np.uint64]:
        """[n] the distinct 64-bit hashes of a text's 13-grams, sorted."""
        words = _WORD.findall(text.lower())
        if len(words) < N_WORDS:
            return np.empty(0, np.uint64)
        if len(self._words) > _CACHE_WORDS:
            self._words.clear()
        known = self._words
        for word in set(words) - known.keys():
            raw = word.encode()
            known[word] = zlib.crc32(raw) << 32 | zlib.crc32(raw, 0x5EED)
        hashed = np.fromiter((known[word] for word in words), np.uint64, len(words))
        hashed ^= hashed >> np.uint64(29)
        hashed *= np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's mixing: crc32 alone is linear
        hashed ^= hashed >> np.uint64(32)
        n = len(hashed) - N_WORDS + 1
        gram = np.zeros(n, np.uint64)
        for i in range(N_WORDS):
            gram = gram * _FACTOR + hashed[i : i + n]
        return np.unique(gram)


def evaluation_texts(folder: str | Path) -> dict[str, str]:
    """The books of `dev` and `test` under a folder, Project Gutenberg's wrapping removed, by "dev/2701" and so on.

    Raises:
        FileNotFoundError: there is no book.
    """
    paths = sorted(Path(folder).glob("*/*.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no dev/*.txt and test/*.txt; give the folder of the evaluation books")
    return {f"{path.parent.name}/{path.stem}": _body(path) for path in paths}


def _body(path: Path) -> str:
    text, _ = decode(path.read_bytes(), name=str(path))
    return strip_gutenberg(text.replace("\r\n", "\n").replace("\r", "\n"), name=str(path))


class Checker:
    """Holds the evaluation books' 13-grams and compares training books with them."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.hasher = Hasher()
        self.of = {name: self.hasher.grams(text) for name, text in texts.items()}
        self.any = np.unique(np.concatenate(list(self.of.values())))
        self.seen = {name: np.empty(0, np.uint64) for name in texts}  # of each, what the training text had so far

    def compare(self, book: Book) -> Overlap:
        """One training book's overlap; `seen` grows by it, unless it is to be dropped."""
        grams = self.hasher.grams(book.text)
        shared = _common(grams, self.any)
        by_book = {name: _common(shared, own) for name, own in self.of.items()} if shared.size else {}
        share = {name: common.size / max(1, self.of[name].size) for name, common in by_book.items() if common.size}
        worst = max(share, key=lambda name: share[name]) if share else ""
        found = Overlap(
            book.source, book.title, grams.size, shared.size, worst,
            by_book[worst].size if worst else 0, share.get(worst, 0.0),
        )  # fmt: skip
        if not found.drop:
            for name in share:
                self.seen[name] = np.union1d(self.seen[name], by_book[name])
        return found


def _common(grams: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Those of `grams` that stand in `known`; both sorted and distinct."""
    if not known.size:
        return known
    at = np.minimum(np.searchsorted(known, grams), known.size - 1)
    return grams[known[at] == grams]


def check(books: Iterable[Book], texts: dict[str, str]) -> dict[str, Any]:
    """Compares all training books with the evaluation books.

    Returns:
        For a JSON file: the settings; for each evaluation book its 13-grams and how many of them stand in the
        training books that stay; the training books that share any, worst first; and the sources to drop.
    """
    checker = Checker(texts)
    found = [checker.compare(book) for book in books]
    sharing = sorted((o for o in found if o.shared), key=lambda o: (-o.drop, -o.worst_share))
    return {
        "n_words": N_WORDS,
        "threshold": THRESHOLD,
        "min_grams": _MIN_GRAMS,
        "training_books": len(found),
        "training_grams": sum(o.grams for o in found),
        "evaluation": {
            name: {"grams": own.size, "in_training": checker.seen[name].size,
                   "share": round(checker.seen[name].size / max(1, own.size), 6)}
            for name, own in checker.of.items()
        },
        "drop": [o.source for o in found if o.drop],
        "books": [asdict(o) for o in sharing],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The result of `check` in lines: the evaluation books that share something, and the training books dropped."""
    lines = [
        f"{found['training_books']} training books, {found['training_grams']:,} 13-grams; "
        f"{len(found['books'])} books share any with an evaluation book"
    ]
    shared = {name: row for name, row in found["evaluation"].items() if row["in_training"]}
    for name, row in sorted(shared.items(), key=lambda item: -item[1]["share"]):
        lines.append(f"{name}: {row['in_training']} of {row['grams']:,} ({100 * row['share']:.3f}%)")
    lines.append(f"{len(found['evaluation']) - len(shared)} evaluation books share nothing")
    for row in found["books"]:
        if row["source"] in found["drop"]:
            share = f"{row['worst_grams']} with {row['worst']} ({100 * row['worst_share']:.2f}%)"
            lines.append(f"drop {row['source']} {row['title']!r}: {share}")
    return "\n".join(lines)
