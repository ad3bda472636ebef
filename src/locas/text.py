"""Read plain text for a memory: decode files, strip Project Gutenberg's wrapping, undo hard line breaks.

`collect` does all of it for files, folders and standard input; the other functions are its steps.
Nothing is guessed silently: a `Document` says what it was decoded with, and what cannot be read is an error.
"""

import codecs
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import BinaryIO

import charset_normalizer

# UTF-32 before UTF-16: the little-endian mark of the first begins with that of the second.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MOSTLY_UTF8 = 4  # characters of UTF-8 beyond ASCII for each wrong byte: other encodings have hardly any
_HEAD_BYTES = 8192  # where a NUL byte marks a file as binary, and where a declared encoding is looked for
_NO_MARKS = "has no Project Gutenberg marks"  # why a file is left out
_DECLARED_ENCODING = re.compile(rb"(?im)^[ \t]*character set encoding:[ \t]*([\w.:-]+)")

_OF_GUTENBERG = r" OF TH(?:E|IS) (?:COPYRIGHTED )?PROJECT GUTENBERG\b"
# A title may wrap the mark over up to three lines; the mark then goes on to the closing stars.
_START = re.compile(
    r"^[ \t]*\*{3}[ \t]*START" + _OF_GUTENBERG + r"(?:(?:(?=.*\S).*\n){0,2}?.*\*{3}[ \t\r]*|.*)$\n?",
    re.I | re.M,
)
_END = re.compile(r"^[ \t]*\*{3}[ \t]*END" + _OF_GUTENBERG, re.I | re.M)
# Before about 2003: the header ends with the "small print", and a plain line follows the book.
_OLD_START = re.compile(r"^\*END\*?[ \t]*THE SMALL PRINT!.*$\n?", re.I | re.M)
_OLD_END = re.compile(r"^[ \t]*End of (?:the |this )?Project Gutenberg\b", re.I | re.M)

_COLUMN_GAP = re.compile(r"\t|\s{3}")
# Hard-wrapped prose has a line at least this wide; narrower groups are verse, headings, lists, addresses.
_MIN_COLUMNS = 40
_MIN_COLUMNS_INDENTED = 55
# Two or three lines of prose often happen to begin with capitals; couplets are seldom this wide.
_MIN_COLUMNS_CAPITALS = 60
# A break was forced by the margin if the next word would have reached past this share of the widest line;
# a group is prose if this share of its breaks was forced.
_FULL_LINE_SHARE = 0.8
_FORCED_BREAK_SHARE = 0.75


@dataclass(frozen=True)
class Document:
    """One text, ready to be tokenized.

    Attributes:
        name: the file's name, its path relative to the folder that was given, or `<stdin>`.
        text: the decoded text, lines ended by "\\n", stripped and reflowed where that was asked for.
        encoding: the Python codec that decoded it.
        sha256: hexadecimal digest of `text` in UTF-8.
    """

    name: str
    text: str
    encoding: str
    sha256: str

    @property
    def n_bytes(self) -> int:
        """Length of `text` in UTF-8 bytes, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


class _NoText(ValueError):
    """A file that is empty or blank. why: what is to be said of it."""

    def __init__(self, label: str, why: str) -> None:
        super().__init__(f"{label} {why}. Give a text, or leave it out.")
        self.why = why


def decode(raw: bytes, *, encoding: str | None = None, name: str = "the input") -> tuple[str, str]:
    """Decode bytes and say with which codec; line ends stay as they are, a byte order mark is dropped.

    Without `encoding`, in this order: a byte order mark, strict UTF-8, the encoding that a Project Gutenberg
    header declares (`Character set encoding: ...`), the guess of charset_normalizer.

    Raises:
        ValueError: the bytes are not in the encoding that was given or that their mark names, the encoding
            is unknown, or none could be found. The message names `name` and the byte offset.
    """
    marked = next((codec for mark, codec in _BYTE_ORDER_MARKS if raw.startswith(mark)), None)
    if encoding is not None:
        advice = "Give the encoding that it is in, or leave --encoding out to have it found."
        text = _decode_strictly(raw, encoding, name, advice).removeprefix("\ufeff")
        if marked and _decodes_as(raw, marked) not in (None, text):
            raise ValueError(
                f"{name} begins with the byte order mark of {marked}, so it is not {encoding}. "
                f"Leave --encoding out, or give {marked}."
            )
        return text, encoding
    if marked:
        advice = "Its byte order mark promises that encoding: mend the file, or overrule it with --encoding."
        return _decode_strictly(raw, marked, name, advice), marked
    for codec in ("utf-8", *_declared_encodings(raw)):
        decoded = _decodes_as(raw, codec)
        if decoded is not None:
            return decoded, codec
    _refuse_damaged_utf8(raw, name)
    guess = charset_normalizer.from_bytes(raw).best()
    if guess is None:
        raise ValueError(
            f"The encoding of {name} could not be found: it is not UTF-8, it has no byte order mark, no "
            "Project Gutenberg header declares an encoding that fits, and guessing failed. Say what it is "
            "with --encoding, for example --encoding cp1252, or leave the file out if it is not text."
        )
    return str(guess), guess.encoding


def _refuse_damaged_utf8(raw: bytes, name: str) -> None:
    """Raises ValueError for UTF-8 with a few wrong bytes or a character cut in two: a guess would garble all of it."""
    decoded = raw.decode("utf-8", errors="replace")
    bad = decoded.count("\ufffd")
    good = sum(not character.isascii() for character in decoded) - bad
    if good >= _MOSTLY_UTF8 * bad:
        advice = "Elsewhere it is: mend it (`iconv -f utf-8 -t utf-8 -c` drops such bytes), or give its --encoding."
        _decode_strictly(raw, "utf-8", name, advice)


def _decode_strictly(raw: bytes, encoding: str, name: str, advice: str) -> str:
    try:
        return raw.decode(encoding)
    except LookupError as error:
        raise ValueError(
            f"{encoding!r} is not a text encoding that Python knows. "
            "Give one such as utf-8, cp1252 or utf-16, or leave --encoding out to have it found."
        ) from error
    except UnicodeDecodeError as error:
        # The utf-8-sig codec counts from behind the mark, in `error.object`.
        offset = error.start + len(raw) - len(error.object)
        raise ValueError(
            f"{name} is not {encoding}: byte 0x{raw[offset]:02x} at offset {offset} cannot be decoded "
            f"({error.reason}). {advice}"
        ) from error


def _decodes_as(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except (LookupError, UnicodeError):
        return None


def _declared_encodings(raw: bytes) -> Iterator[str]:
    """Yield what a Project Gutenberg header declares; many "ISO-8859-1" files are really cp1252."""
    found = _DECLARED_ENCODING.search(raw[:_HEAD_BYTES])
    if found is None:
        return
    declared = found[1].decode("ascii").lower()
    if declared == "iso-8859-1" and any(0x80 <= byte <= 0x9F for byte in raw):
        yield "cp1252"  # ISO-8859-1 has only control characters there; cp1252 fails on the five it leaves out
    yield declared


def strip_gutenberg(text: str, *, name: str = "the input") -> str:
    """Return exactly what stands between Project Gutenberg's START and END marks.

    The body begins on the line after the START mark, which may wrap, and ends where the END mark's line
    begins. Credits ("Produced by ...") and the line "End of the Project Gutenberg EBook of ..." stand inside
    the marks and stay. Marks of before 2003 are used where the newer ones are missing.

    Raises:
        ValueError: a mark is missing, or there are several of one kind.
    """
    start = _only_mark(_START, text, 0, "START", name) or _OLD_START.search(text)
    if start is None:
        raise ValueError(
            f'No Project Gutenberg mark was found in {name}: no line begins with "*** START OF THE PROJECT '
            'GUTENBERG". Drop --gutenberg for texts that are not Project Gutenberg e-books.'
        )
    end = _only_mark(_END, text, start.end(), "END", name) or _OLD_END.search(text, start.end())
    if end is None:
        raise ValueError(
            f'{name} has a Project Gutenberg START mark, but no line after it begins with "*** END OF THE '
            'PROJECT GUTENBERG". The file may be cut short: fetch it again, or drop --gutenberg.'
        )
    return text[start.end() : end.start()]


def has_gutenberg_marks(raw: bytes) -> bool:
    """Say whether a file, of whatever encoding, looks like a Project Gutenberg e-book."""
    ascii_text = raw.replace(b"\0", b"").decode("ascii", "ignore").replace("\r\n", "\n")
    return bool(_START.search(ascii_text) or _OLD_START.search(ascii_text))


def _only_mark(pattern: re.Pattern[str], text: str, start: int, kind: str, name: str) -> re.Match[str] | None:
    marks = list(pattern.finditer(text, start))
    if len(marks) > 1:
        raise ValueError(
            f"{name} has {len(marks)} Project Gutenberg {kind} marks, and one is allowed. "
            "Split it into one file per e-book, or drop --gutenberg."
        )
    return marks[0] if marks else None


def reflow(text: str) -> str:
    """Join hard-wrapped lines into paragraphs, and leave verse, headings, lists and tables as they are.

    Blank lines separate paragraphs: a run of them becomes one, those at the ends are dropped. Within a
    paragraph, neighbouring lines with the same indentation form a group (a line with a tab or three spaces
    inside is tabular and stands alone; one leading space is no indentation, but a common slip), and a whole
    group becomes one line, or none of it does. It does if

    * its widest line (the last apart, which may be of any length) is wide for verse: `_MIN_COLUMNS`, or
      `_MIN_COLUMNS_INDENTED` if it is indented;
    * most of its breaks came from the margin: with the next word, the line would have been about full;
    * it does not look like verse, where every line begins with a capital; two or three wide lines may.

    Lines join with a space, or with nothing after a letter and a single hyphen ("to-" + "morrow"), since
    Project Gutenberg keeps only real hyphens. Only white space ever changes; a second reflow changes nothing.
    """
    lines = [line.rstrip() for line in _normalize_newlines(text).split("\n")]
    paragraphs = (list(group) for has_text, group in groupby(lines, key=bool) if has_text)
    return "\n\n".join("\n".join(_join_wrapped(paragraph)) for paragraph in paragraphs)


def one_paragraph_a_line(text: str) -> str:
    """Drop the blank lines of a reflowed text: the form that the built-in backbones were trained on."""
    return re.sub(r"\n\n+", "\n", text)


def _join_wrapped(paragraph: list[str]) -> Iterator[str]:
    # The number keeps tabular lines apart: each is its own group.
    keys = (
        (-1, _indentation(line)) if not _COLUMN_GAP.search(line.lstrip()) else (number, "")
        for number, line in enumerate(paragraph)
    )
    for (_, indent), group in groupby(zip(keys, paragraph, strict=True), key=lambda pair: pair[0]):
        lines = [line for _, line in group]
        if not _is_wrapped_prose([line.strip() for line in lines], indented=bool(indent)):
            yield from lines
            continue
        joined = lines[0]
        for line in lines[1:]:
            ends_in_hyphen = len(joined) > 1 and joined[-1] == "-" and joined[-2].isalpha()
            joined += ("" if ends_in_hyphen else " ") + line.lstrip()
        yield joined


def _is_wrapped_prose(lines: list[str], *, indented: bool) -> bool:
    """Say whether the breaks of a group of stripped lines come from a margin; see `reflow`."""
    if len(lines) < 2:
        return False
    columns = max(len(line) for line in lines[:-1])
    if columns < (_MIN_COLUMNS_INDENTED if indented else _MIN_COLUMNS):
        return False
    forced = [
        len(line) + 1 + len(following.split(maxsplit=1)[0]) > _FULL_LINE_SHARE * columns
        for line, following in pairwise(lines)
    ]
    if sum(forced) < _FORCED_BREAK_SHARE * len(forced):
        return False
    few_and_wide = len(lines) <= 3 and columns >= _MIN_COLUMNS_CAPITALS
    return few_and_wide or not all(_begins_with_capital(line) for line in lines[1:])


def _begins_with_capital(line: str) -> bool:
    return next((char for char in line if char.isalpha()), "").isupper()


def _indentation(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return "" if indent == " " else indent


def _normalize_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def collect(
    paths: Sequence[str | Path],
    *,
    gutenberg: bool = False,
    reflow: bool = False,
    encoding: str | None = None,
    stdin: BinaryIO | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> list[Document]:
    """Read texts in the order given; "-" is standard input, a folder gives all its text files.

    A folder is walked in sorted order. Hidden files and folders, binary files and files without text in it are skipped,
    and links to folders are not followed. Everything else in it must be a text, or the call fails.

    Args:
        paths: files, folders, "-".
        gutenberg: keep only what stands between Project Gutenberg's marks. A file that was named must have them;
            in a folder, files that have none (a list, a readme) are skipped.
        reflow: join hard-wrapped lines (see the function `reflow`), one paragraph a line.
        encoding: Python codec of all the texts; found for each text if None.
        stdin: read for "-" in place of `sys.stdin.buffer`.
        on_skip: called with the path of each file in a folder that was left out because it is empty, blank, or without
            the marks that `gutenberg` asks for, and with that reason.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path has no text to give: unreadable, binary, undecodable, empty, without marks.
    """
    if not paths:
        raise ValueError("No text was given. Give files, folders, or - for standard input.")
    if sum(str(path) == "-" for path in paths) > 1:
        raise ValueError('"-" was given more than once, but standard input can be read only once.')
    documents: list[Document] = []
    for path in paths:
        found = len(documents)
        skipped: dict[str, str] = {}
        for raw, name, label in _sources(path, encoding, stdin):
            in_folder = Path(path).is_dir()
            if gutenberg and in_folder and not has_gutenberg_marks(raw):
                skipped[label] = _NO_MARKS
                continue
            try:
                document = _make_document(raw, name, label, gutenberg=gutenberg, unwrap=reflow, encoding=encoding)
            except _NoText as error:
                if not in_folder:
                    raise
                skipped[label] = error.why
            else:
                documents.append(document)
        if skipped and len(documents) == found:
            _refuse_folder(path, skipped)
        if on_skip is not None:
            for label, why in skipped.items():
                on_skip(label, why)
    return documents


def _refuse_folder(path: str | Path, skipped: dict[str, str]) -> None:
    """Raises ValueError for a folder of which nothing is left. skipped: {file: why}."""
    if unmarked := next((label for label, why in skipped.items() if why == _NO_MARKS), None):
        raise ValueError(
            f"No file in the folder {path} has Project Gutenberg's marks ({unmarked} has none). "
            "Drop --gutenberg for texts that are not Project Gutenberg e-books."
        )
    label, why = next(iter(skipped.items()))
    raise ValueError(f"No file in the folder {path} has any text ({label} {why}). Give a folder with text files.")


def _sources(path: str | Path, encoding: str | None, stdin: BinaryIO | None) -> Iterator[tuple[bytes, str, str]]:
    """Yield bytes, document name and the name for messages, of everything that one path stands for."""
    found = False
    try:
        for source in _read_sources(path, encoding, stdin):
            found = True
            yield source
    except OSError as error:
        raise ValueError(
            f"{error.filename or path} cannot be read: {error.strerror}. Change its permissions, mend the "
            "link if it is one, or leave it out."
        ) from error
    if not found and not Path(path).exists():
        raise FileNotFoundError(f"There is no file or folder {path}. Check the path; - is standard input.")
    if not found:
        raise ValueError(
            f"The folder {path} has no text file: hidden and binary files are skipped, and it has nothing "
            "else. Give a folder with text files, or name the files."
        )


def _read_sources(path: str | Path, encoding: str | None, stdin: BinaryIO | None) -> Iterator[tuple[bytes, str, str]]:
    if str(path) == "-":
        yield (stdin or sys.stdin.buffer).read(), "<stdin>", "standard input"
        return
    path = Path(path)
    if path.is_dir():
        for file_path in _walk(path):
            with file_path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
                if not _is_binary(head, encoding):
                    yield head + file.read(), file_path.relative_to(path).as_posix(), str(file_path)
    elif path.exists():
        yield path.read_bytes(), path.name, str(path)


def _walk(folder: Path) -> list[Path]:
    """List what is not hidden, not a folder and not a pipe or socket, sorted by the parts of its path."""

    def refuse(error: OSError) -> None:
        raise error

    files = []
    # Links to folders are not followed, so a loop of them ends the walk like any other link.
    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(top, name) for name in names if not name.startswith(".")]
        # A dangling link stays in, and reading it says so.
        files += [path for path in paths if path.is_file() or not path.exists()]
    return sorted(files)


def _is_binary(raw: bytes, encoding: str | None) -> bool:
    """Say whether a NUL stands in the head of a file that is not UTF-16 or UTF-32, where NULs are normal."""
    if any(raw.startswith(mark) for mark, _ in _BYTE_ORDER_MARKS[1:]):
        return False
    if encoding is not None and re.match(r"u(tf)?[-_ ]?(16|32)", encoding, re.I):
        return False
    return b"\0" in raw[:_HEAD_BYTES]


def _make_document(
    raw: bytes, name: str, label: str, *, gutenberg: bool, unwrap: bool, encoding: str | None
) -> Document:
    if not raw:
        raise _NoText(label, "is empty")
    if _is_binary(raw, encoding):
        raise ValueError(
            f"{label} is not text: a NUL byte stands at offset {raw.index(0)}. Give plain text; if it is "
            "UTF-16 without a byte order mark, add --encoding utf-16-le or utf-16-be."
        )
    text, codec = decode(raw, encoding=encoding, name=label)
    text = _normalize_newlines(text)
    if not text.strip():
        raise _NoText(label, "has only white space")
    if gutenberg:
        text = strip_gutenberg(text, name=label)
        if not text.strip():
            raise ValueError(
                f"{label} has only white space between its Project Gutenberg marks. Give a text, or leave it out."
            )
    if unwrap:
        text = one_paragraph_a_line(reflow(text))
    return Document(name, text, codec, hashlib.sha256(text.encode("utf-8")).hexdigest())
