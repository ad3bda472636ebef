"""Decoding, Project Gutenberg's marks, reflow and collecting: by hand, by property and on real books."""

import csv
import hashlib
import io
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locas import text as text_module
from locas.text import Document, collect, decode, reflow, strip_gutenberg

BOOKS = Path(__file__).parents[3] / "shared" / "data" / "books"
START = "*** START OF THIS PROJECT GUTENBERG EBOOK BABY MINE ***\n"
END = "*** END OF THIS PROJECT GUTENBERG EBOOK BABY MINE ***\n"

# No deadline: the machine may be busy. NUL and byte order marks have meanings of their own in `decode`.
relaxed = settings(deadline=None, max_examples=80)
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff\ufffe"), max_size=60)
words = st.sampled_from(["a", "The", "whale", "to-", "--", "I", "1851", "dark", "extraordinary", "É", "x\t y"])
pieces = st.one_of(words, st.sampled_from([" ", "  ", "    ", "\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\f"]))
messy_text = st.one_of(plain_text, st.lists(pieces, max_size=80).map(" ".join))


def wrapped(n_lines: int, columns: int, indent: str = "") -> str:
    """Return prose hard-wrapped to exactly `columns` on every line but the last."""
    line = "whale " * (columns // 6 - 1)
    return "\n".join([indent + line + "w" * (columns - len(line))] * n_lines + [indent + "the end."])


# Decoding


@relaxed
@given(plain_text)
def test_utf8_round_trips(text: str) -> None:
    assert decode(text.encode("utf-8")) == (text, "utf-8")
    assert decode(text.encode("utf-8-sig")) == (text, "utf-8-sig")


@relaxed
@given(plain_text, st.sampled_from(["utf-16", "utf-32"]))
def test_wide_encodings_with_a_mark_round_trip(text: str, codec: str) -> None:
    assert decode(text.encode(codec)) == (text, codec)
    big_endian = ("\ufeff" + text).encode(f"{codec}-be")
    assert decode(big_endian) == (text, codec)


@relaxed
@given(plain_text, st.sampled_from(["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"]))
def test_explicit_encoding_round_trips_and_drops_the_mark(text: str, codec: str) -> None:
    assert decode(text.encode(codec), encoding=codec) == (text, codec)
    assert decode(("\ufeff" + text).encode(codec), encoding=codec) == (text, codec)


@pytest.mark.parametrize(
    ("body", "codec", "text"),
    [
        (b"caf\xe9", "iso-8859-1", "café"),
        (b"\x93caf\xe9\x94", "cp1252", "“café”"),
        (b"\x81 caf\xe9", "iso-8859-1", "\x81 café"),  # cp1252 leaves 0x81 undefined
    ],
)
def test_declared_latin1_may_be_cp1252(body: bytes, codec: str, text: str) -> None:
    header = b"Title: X\r\n\r\nCharacter set encoding: ISO-8859-1\r\n\r\n"
    assert decode(header + body) == (header.decode() + text, codec)


def test_declaration_is_only_believed_where_it_fits() -> None:
    assert decode("Character set encoding: ASCII\ncafé".encode()) == (
        "Character set encoding: ASCII\ncafé",
        "utf-8",
    )
    late = b" " * 9000 + b"\nCharacter set encoding: cp437\n" + "Où était l'élève ? À l'école.".encode("cp1252")
    assert decode(late)[1] != "cp437"
    unknown = b"Character set encoding: klingon\n" + "L'élève était à l'école, où il rêvait.".encode("cp1252")
    assert decode(unknown)[1] != "klingon"


def test_guess_reads_undeclared_text() -> None:
    russian = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "
    assert decode((russian * 5).encode("cp1251")) == (russian * 5, "cp1251")


def test_no_encoding_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMatches:
        def best(self) -> None:
            return None

    monkeypatch.setattr(text_module.charset_normalizer, "from_bytes", lambda raw: NoMatches())
    with pytest.raises(ValueError, match=r"The encoding of a\.txt could not be found: .* --encoding cp1252"):
        decode(b"\xe9\xff", name="a.txt")


@pytest.mark.parametrize(
    ("raw", "encoding", "message"),
    [
        (b"abcd\xe9f", "ascii", r"a\.txt is not ascii: byte 0xe9 at offset 4 .*leave --encoding out"),
        (b"abc", "utf-9", r"'utf-9' is not a text encoding that Python knows\. Give one such as utf-8"),
        (b"abc", "hex", r"'hex' is not a text encoding"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "cp1252", r"byte order mark of utf-8-sig, so it is not cp1252\."),
        (b"\xef\xbb\xbfcaf\xe9", None, r"a\.txt is not utf-8-sig: byte 0xe9 at offset 6 .*mend the file"),
    ],
)
def test_decoding_errors(raw: bytes, encoding: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(raw, encoding=encoding, name="a.txt")


# Project Gutenberg's marks


@relaxed
@given(plain_text)
@example("\n\nCHAPTER IX\nTHE END OF THE ROAD\n\n*** THE END OF IT ***\n*** START: FULL LICENSE ***\n")
def test_body_is_recovered_exactly(text: str) -> None:
    body = text.replace("\r", "") + "\n"
    assert strip_gutenberg("Title: X\n\n" + START + body + END + "\nlicence") == body


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (
            "***START OF THE PROJECT GUTENBERG EBOOK PIONEER DAYS IN\nST. PAUL***\n",
            "***END OF THE PROJECT GUTENBERG",
        ),
        (
            "*** START OF THE PROJECT GUTENBERG EBOOK, X ***\r\n",
            "*** END OF THE PROJECT GUTENBERG EBOOK, X ***\r\n",
        ),
        ("*** START OF THE PROJECT GUTENBERG ETEXT X\n", "*** END OF THE PROJECT GUTENBERG ETEXT X"),
        (
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
            "End of Project Gutenberg's X\n",
        ),
        ("*END THE SMALL PRINT! FOR ETEXTS*\n", "End of the Project Gutenberg Etext of X\n"),
        (START, "End of Project Gutenberg's Baby Mine, by Margaret Mayo\n"),
    ],
)
def test_forms_of_the_marks(start: str, end: str) -> None:
    body = "\nI\n\nThe text.\n\n"
    assert strip_gutenberg("Title\n" + start + body + end) == body


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "A text.\nTHE END OF THE PROJECT\n",
            r"No Project Gutenberg mark was found in x\.txt: .*Drop --gutenberg",
        ),
        ('He read "*** START OF THE PROJECT GUTENBERG" aloud.', r"No Project Gutenberg mark was found"),
        (START + "A text.", r"x\.txt has a .* START mark, but no line after it .*cut short"),
        (END + START + "A text.", r"START mark, but no line after it"),
        (START + END + START + END, r"x\.txt has 2 Project Gutenberg START marks.*one file per e-book"),
        (START + END + END, r"x\.txt has 2 Project Gutenberg END marks"),
    ],
)
def test_mark_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strip_gutenberg(text, name="x.txt")


# Reflow


@relaxed
@given(messy_text)
def test_reflow_is_idempotent_and_changes_only_white_space(text: str) -> None:
    once = reflow(text)
    assert reflow(once) == once
    assert "".join(once.split()) == "".join(text.split())


@relaxed
@given(st.integers(1, 5), st.integers(60, 80), st.sampled_from(["", " ", "    "]))
def test_reflow_joins_wrapped_prose_of_any_margin(n_lines: int, columns: int, indent: str) -> None:
    text = wrapped(n_lines, columns, indent)
    joined = reflow(text + "\n\n\n \n" + text + "\n")
    assert joined == "\n\n".join([indent + " ".join(text.split())] * 2)


PROSE = """\
The Highlanders were continually at war with the Lowlanders. They
did not regard their plundering raids upon the richer grounds of the
Lowlands as robbery, but as rightful recovery of possessions which had
been wrongfully wrested from their ancestors."""
NARROW_PROSE = """\
"If we'd known how jolly they were, we'd
have tried them before," Bell declared one
morning, dropping down on the rug Pauline
had spread under the trees at one end of the parsonage lawn."""
SLIPPED_SPACE = """\
“I didn't mean it!” interposed Aggie contritely. “Oh, come now, Jimmy,”
 she pleaded, “let's trundle off to bed and forget all about it.” And
they did."""
QUOTED_LETTER = """\
     Colonel Bramlette with his regiment has just forcibly taken
     possession of a train of cars, and will at once start for
     Lexington. You are in danger."""


@pytest.mark.parametrize("text", [PROSE, NARROW_PROSE, SLIPPED_SPACE, QUOTED_LETTER])
def test_reflow_joins(text: str) -> None:
    assert reflow(text).lstrip() == " ".join(text.split())


VERSE = """\
    "Huntsman, rest! thy chase is done;
      While our slumbrous spells assail ye,
    Dream not, with the rising sun,
      Bugles here shall sound reveille.[82]"""
WIDE_VERSE = """\
   When in salt seas Sir Francis Drake did steer,
   Sailing in oak he say'd one day i'th'year.
   His oak, which the terrestrial globe did measure,
   Through dangers led him t' honour, profit, pleasure."""
FLUSH_HEXAMETERS = """\
This is the forest primeval. The murmuring pines and the hemlocks,
Bearded with moss, and in garments green, indistinct in the twilight,
Stand like Druids of eld, with voices sad and prophetic,
Stand like harpers hoar, with beards that rest on their bosoms."""
TABLE = """\
CHAPTER                                PAGE
      I  The Happy Girl                   1
     II  A Ride In The Rain              19"""
RECKONING = """\
Received in part, from the factor at the harbour,   0 10  0
unpaid by the same, and never to be seen again,   L.0  5  5"""
ADDRESSES = """\
Produced at the expense of the Committee of Council on Education
by
Chapman and Hall, Ltd., London.
MCMXIV"""


@pytest.mark.parametrize(
    "text", [VERSE, WIDE_VERSE, FLUSH_HEXAMETERS, TABLE, RECKONING, ADDRESSES, "CHAPTER I\nTHE CHASE"]
)
def test_reflow_keeps_the_lines_of_verse_tables_and_headings(text: str) -> None:
    assert reflow("\n\n" + text + "\n\n") == text


def test_reflow_knows_a_real_hyphen_from_a_dash() -> None:
    head = "It was a long way off and he did not mean to come back, or not "
    assert reflow(head + "to-\nmorrow or the day after.") == head + "to-morrow or the day after."
    assert reflow(head + "at all--\nor so he said.") == head + "at all-- or so he said."
    assert reflow(head + "in 1851-\n52, he said.") == head + "in 1851- 52, he said."


def test_reflow_of_nothing() -> None:
    assert reflow("") == reflow(" \n\r\n\t\n") == ""


# Collecting


def test_document_counts_utf8_bytes_and_is_frozen() -> None:
    document = Document("a", "café", "utf-8", "0")
    assert document.n_bytes == 5
    with pytest.raises(FrozenInstanceError):
        document.text = ""  # type: ignore[misc]


def test_collect_reads_files_folders_and_stdin_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "2.txt").write_bytes("zwei ü\r\nzeilen\rdrei".encode("utf-16"))
    (folder / "b" / "10.txt").write_bytes(b"ten")
    (folder / "b.txt").write_bytes(b"one")
    for skipped in (folder / ".hidden", folder / ".git" / "config"):
        skipped.write_bytes(b"hidden")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "b" / "loop").symlink_to(folder)
    documents = collect(["-", folder, str(folder / "b.txt")], stdin=io.BytesIO(b"from a pipe"))
    assert [d.name for d in documents] == ["<stdin>", "b/10.txt", "b/2.txt", "b.txt", "b.txt"]
    assert documents[2].text == "zwei ü\nzeilen\ndrei"
    assert documents[2].encoding == "utf-16"
    assert documents[2].sha256 == hashlib.sha256(documents[2].text.encode()).hexdigest()


def test_collect_strips_and_reflows_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(f"Title: X\n{START}\n\n{PROSE}\n\n{END}".replace("\n", "\r\n").encode())
    (document,) = collect([path], gutenberg=True, reflow=True)
    assert document.text == " ".join(PROSE.split())
    assert collect([path], gutenberg=True)[0].text == f"\n\n{PROSE}\n\n"
    path.write_text(f"{PROSE}\n\n\n{PROSE}\n")
    (document,) = collect([path], reflow=True)
    assert document.text == "\n".join([" ".join(PROSE.split())] * 2)


def test_explicit_encoding_lets_unmarked_utf16_through(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("unmarked".encode("utf-16-le"))
    assert collect([path], encoding="utf-16-le")[0].text == "unmarked"
    with pytest.raises(ValueError, match=r"a\.txt is not text: a NUL byte stands at offset 1\. .*utf-16-le"):
        collect([path])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            f"{START}\n{END}".encode(),
            {"gutenberg": True},
            r"only white space between its Project Gutenberg marks",
        ),
        (b"caf\xe9", {"encoding": "utf-8"}, r"a\.txt is not utf-8: byte 0xe9 at offset 3"),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_collect_names_the_file_that_fails(
    tmp_path: Path, content: bytes, options: dict[str, object], message: str, as_folder: bool
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        collect([tmp_path if as_folder else path], **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "why"),
    [
        (b"", {}, "is empty"),
        (b"", {"gutenberg": True}, "has no Project Gutenberg marks"),
        (b" \r\n\t", {}, "has only white space"),
        ("\ufeff \n".encode("utf-16-le"), {"reflow": True}, "has only white space"),
    ],
)
def test_files_without_text_are_skipped_in_a_folder_but_not_when_named(
    tmp_path: Path, content: bytes, options: dict[str, bool], why: str
) -> None:
    path = tmp_path / "__init__.py"
    path.write_bytes(content)
    if "gutenberg" not in options:
        with pytest.raises(ValueError, match=rf"__init__\.py {why}\. Give a text, or leave it out\.$"):
            collect([path], **options)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=rf"^No file in the folder .* has any text \(.*__init__\.py {why}\)\. Give"
        ):
            collect([tmp_path], **options)  # type: ignore[arg-type]
    (tmp_path / "a.py").write_text(f"{START}\n{PROSE}\n{END}")
    skipped: list[tuple[str, str]] = []
    documents = collect([tmp_path], on_skip=lambda *what: skipped.append(what), **options)  # type: ignore[arg-type]
    assert [d.name for d in documents] == ["a.py"]
    assert skipped == [(str(path), why)]


def test_files_without_marks_are_skipped_in_a_folder_but_not_when_named(tmp_path: Path) -> None:
    plain = tmp_path / "readme.txt"
    plain.write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"mark was found in .*readme\.txt: .*Drop --gutenberg"):
        collect([plain], gutenberg=True)
    with pytest.raises(ValueError, match=r"No file in the folder .* \(.*readme\.txt has none\)\. Drop --gutenberg"):
        collect([tmp_path], gutenberg=True)
    (tmp_path / "book.txt").write_bytes(f"{START}\n{PROSE}\n{END}".encode())
    (tmp_path / "wide.txt").write_bytes(f"{START}\n{PROSE}\n{END}".encode("utf-16"))
    skipped: list[str] = []
    documents = collect([tmp_path], gutenberg=True, on_skip=lambda path, _: skipped.append(path))
    assert [d.name for d in documents] == ["book.txt", "wide.txt"]
    assert skipped == [str(plain)]


def test_collect_refuses_what_has_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"No text was given\. Give files, folders, or -"):
        collect([])
    with pytest.raises(ValueError, match=r'"-" was given more than once'):
        collect(["-", "-"], stdin=io.BytesIO(b"text"))
    with pytest.raises(ValueError, match=r"^standard input is empty\."):
        collect(["-"], stdin=io.BytesIO(b""))
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*gone\.txt\. Check the path"):
        collect([tmp_path / "gone.txt"])
    (tmp_path / ".hidden").write_bytes(b"text")
    (tmp_path / "binary").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"The folder .* has no text file: hidden and binary files are skipped"):
        collect([tmp_path])
    with pytest.raises(ValueError, match=r"binary is not text: a NUL byte stands at offset 0\."):
        collect([tmp_path / "binary"])
    with pytest.raises(ValueError, match=r"cannot be read: File name too long\."):
        collect(["A whole text in place of a path. " * 20])
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"dangling cannot be read: .*mend the link"):
        collect([tmp_path])

    def forbid(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbid)  # file modes would not stop root
    with pytest.raises(ValueError, match=r"binary cannot be read: Permission denied\. Change its permissions"):
        collect([tmp_path / "binary"])


# Real books


def book_rows() -> list[dict[str, str]]:
    manifests = sorted(BOOKS.glob("*/manifest.csv"))
    return [
        row | {"path": str(path.parent / row["file"])}
        for path in manifests
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]


def test_real_books_agree_with_their_manifest() -> None:
    rows = book_rows()
    if not rows:
        pytest.skip(f"the books are not at {BOOKS}; this runs wherever they are")
    differences = {}
    for row in rows:
        (book,) = collect([row["path"]], gutenberg=True)
        expected = {"ascii": "utf-8", "iso-8859-1/cp1252": "iso-8859-1"}.get(row["encoding"], row["encoding"])
        assert book.encoding == expected, row["id"]
        # body_chars counts CR and LF, from the line after the START mark's first to the END mark's line.
        differences[row["id"]] = len(book.text) + book.text.count("\n") - int(row["body_chars"])
        flowed = reflow(book.text)
        assert reflow(flowed) == flowed, row["id"]
        assert "".join(flowed.split()) == "".join(book.text.split()), row["id"]
    # 10146 wraps its START mark: the 13 characters "ST. PAUL***" CR LF are no body. 40579 has two bare LFs.
    known = {"10146": -13, "40579": 2}
    assert differences == {row["id"]: known.get(row["id"], 0) for row in rows}
    assert len(rows) == 33


@pytest.mark.parametrize(
    ("book", "excerpt"),
    [
        (
            "2701",
            r"\nCall me Ishmael\. Some years ago—never mind how long precisely—having little or no money",
        ),
        (
            "5962",
            r"\nA moment later the door of the lawyer's sumptuously appointed office closed behind him\.",
        ),
        (
            "26239",
            r"\n      I  The Happy Girl                   1\n     II  A Ride In The Rain              19\n",
        ),
        (
            "45888",
            r"\n    Dream not, with the rising sun,\n      Bugles here shall sound reveille\.\[82\]\n",
        ),
        (
            "45888",
            r"\n       \*       \*       \*       \*       \*\nIn August, 1502, .* throne of England\.\n",
        ),
    ],
)
def test_reflowed_excerpts_of_real_books(book: str, excerpt: str) -> None:
    path = BOOKS / "dev" / f"{book}.txt"
    if not path.exists():
        pytest.skip(f"the books are not at {BOOKS}; this runs wherever they are")
    (document,) = collect([path], gutenberg=True, reflow=True)
    assert re.search(excerpt, document.text)


_QUOTED = "“Yes,” said he; “naïve.”".encode() * 3


@pytest.mark.parametrize(
    ("raw", "offset"),
    [
        (_QUOTED[1:], 0),  # cut in the middle of a character
        (_QUOTED[:-1], len(_QUOTED) - 3),
        (_QUOTED + b"\x92" + _QUOTED, len(_QUOTED)),
    ],
)
def test_damaged_utf8_is_taken_for_no_other_encoding(raw: bytes, offset: int) -> None:
    with pytest.raises(ValueError, match=rf"x is not utf-8: byte 0x.. at offset {offset} cannot be decoded"):
        decode(raw, name="x")
    assert decode(raw, encoding="latin-1", name="x") == (raw.decode("latin-1"), "latin-1")
