"""The training text, book by book: which form and which typography each one gets, decided by a seeded hash.

Half of the books stay as they stand in the files (hard wraps), half are re-flowed to one paragraph a line. The files
hold ASCII alone, while a third of Project Gutenberg's books have curly quotes and dashes; so some get those here.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from locas.text import one_paragraph_a_line, reflow

FORMS = ("wrapped", "reflowed")
# Shares like those of the 33 evaluation books, 12 of which have curly quotes and 3 of those long dashes, more or less.
STYLES = (("plain", 0.70), ("curly double quotes", 0.05), ("curly quotes", 0.10), ("curly quotes and dashes", 0.15))

_WORDS_CUT_IN_FRONT = r"(?:tis|twas|twere|twill|twould|til|till|em|im|er|bout|cause|gainst|neath|round|ere|way|un|d)\b"
_OPENING = r"(?:(?<=[\s(\[{“‘_—\-])|^)"
_DOUBLE_OPENING = re.compile(_OPENING + r"\"(?=[^\s\"])|^\"", re.M)
_APOSTROPHE_IN_FRONT = re.compile(rf"(?<!\w)'(?=\d|{_WORDS_CUT_IN_FRONT})", re.I)
_SINGLE_OPENING = re.compile(_OPENING + r"'(?=[^\s'])", re.M)
_DASH = re.compile(r"(?<!-)--(?!-)|(?<!-)----(?!-)")


@dataclass(frozen=True)
class Book:
    """One book of the training text.

    Attributes:
        source: its file and number in it, such as "train-0:17".
        text: as it stands in the file.
        sha256: of `text` in UTF-8; what form and style are drawn from, so that they do not depend on the files' order.
    """

    source: str
    text: str
    sha256: str

    @property
    def title(self) -> str:
        """The first line with something in it."""
        return next((line.strip() for line in self.text.split("\n") if line.strip()), "")[:80]


def files(folder: str | Path, split: str = "train") -> list[Path]:
    """The .txt.xz files of a split, in order.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(Path(folder).glob(f"{split}*.txt.xz"))
    if not found:
        raise FileNotFoundError(f"{folder} has no {split}*.txt.xz; give the folder with the training text")
    return found


def read_books(path: Path) -> Iterator[Book]:
    """The books of one .txt.xz file, a form feed on a line of its own between them."""
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    for number, book in enumerate(text.split("\n\f\n")):
        book = book.strip("\n") + "\n"
        name = path.name.removesuffix(".txt.xz")
        yield Book(f"{name}:{number}", book, hashlib.sha256(book.encode()).hexdigest())


def draw(book: Book, seed: int, what: str) -> float:
    """A number in [0, 1) that depends on the book's text, the seed and the purpose, and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{what}:{book.sha256}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def form_of(book: Book, seed: int) -> str:
    """ "wrapped" or "reflowed", each for half of the books."""
    return FORMS[draw(book, seed, "form") >= 0.5]


def style_of(book: Book, seed: int) -> str:
    """The book's typography, one of `STYLES` with its share; "plain" for one that has curly quotes already."""
    if "“" in book.text or "’" in book.text:
        return "plain"
    left = draw(book, seed, "style")
    for name, share in STYLES:
        left -= share
        if left < 0:
            return name
    return STYLES[-1][0]


def prepared(book: Book, seed: int, *, form: str | None = None) -> str:
    """The text that is tokenized: the book in its typography and its form (or in the form that is given)."""
    text = typeset(book.text, style_of(book, seed))
    return one_paragraph_a_line(reflow(text)) if (form or form_of(book, seed)) == "reflowed" else text


def typeset(text: str, style: str) -> str:
    """Straight quotes and double hyphens made typographic, as far as the style says.

    >>> typeset('"Tis late," he said--"isn\\'t it?"', "curly quotes and dashes")
    '“Tis late,” he said—“isn’t it?”'
    """
    if style == "plain":
        return text
    if style.endswith("dashes"):
        text = _DASH.sub(lambda match: "—" * (len(match[0]) // 2), text)
    text = _DOUBLE_OPENING.sub("“", text).replace('"', "”")
    if style == "curly double quotes":
        return text
    text = _APOSTROPHE_IN_FRONT.sub("’", text)
    return _SINGLE_OPENING.sub("‘", text).replace("'", "’")
