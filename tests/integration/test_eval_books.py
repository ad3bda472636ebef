"""`locas eval books` and its report, on real files."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import locas.cli
from locas.backbone import load_backbone
from locas.evaluate.book import Book, Method, load_text
from locas.evaluate.books import BooksRun, load_losses
from locas.evaluate.books_figures import joined, results, together, with_memory_of
from locas.evaluate.cells import finite
from locas.evaluate.pg19 import from_rows, pg19
from locas.evaluate.report import differences_picture, write_report
from locas.evaluate.words import best_stretch, coloured, top_words
from locas.memory import create, read
from locas.store import save_tensors
from locas.stream import ReadSettings
from locas.text import Document
from locas.write import WriteSettings
from processes import Locas, sentences

pytestmark = pytest.mark.integration

ARGS = ("--methods", "truncation,locas:rank=3,templora-tuned:rank=2", "--window", "64", "--chunk", "32")
NASTY = "</script><script>alert(1)</script> & <b>"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short books, one with markup in its text and a quote in its name."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "one.txt").write_text(sentences(40))
    (folder / "it's <two>.txt").write_text(f"Café – {NASTY}\n" + sentences(30, seed=1))
    return folder


@pytest.fixture(scope="module")
def evaluated(library: Path, tmp_path_factory: pytest.TempPathFactory, locas: Locas) -> tuple[Path, dict[str, Any]]:
    """(the folder of a finished evaluation, what it printed)."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    done = locas("eval", "books", library, *ARGS, "--max-tokens", 70, "--seeds", "0,1", "-o", folder, "--json")
    return folder, json.loads(done.stdout)


def test_the_figures_are_those_of_the_library(evaluated: tuple[Path, dict[str, Any]], library: Path) -> None:
    _, found = evaluated
    backbone = load_backbone()
    settings = ReadSettings(window=64, chunk=32, start_in_every_window=backbone.start_in_every_window)
    text = (library / "one.txt").read_text()
    ids, n_bytes = backbone.encode(text, 70)
    memory = create(backbone.model, ids[:32], rank=3, start_id=backbone.start_id)
    memorize = replace(settings, reuse=True, attention_gradient="values", write=WriteSettings(damping=0.1))
    for name, of, how in (("truncation", None, settings), ("locas:rank=3", memory, memorize)):
        records = list(read(backbone.model, of, ids, how, start_id=backbone.start_id))
        nll = torch.cat([r.nll for r in records]).double()
        got = found["methods"][name]["per_book"]["one.txt"]
        assert (got["tokens"], got["bytes"]) == (70, n_bytes)
        assert got["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / n_bytes, rel=1e-6)
        assert got["perplexity"] == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
        chunks = [(r.nll.numel(), math.exp(float(r.nll.double().mean()))) for r in records]
        assert got["perplexity_chunk_mean"] == pytest.approx(sum(n * p for n, p in chunks) / 70, rel=1e-6)
    assert found["methods"]["locas:rank=3"]["parameters"] == memory.n_parameters


def test_the_result_says_everything_that_it_should(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, found = evaluated
    assert {"commit", "seeds", "versions", "settings", "device", "books", "methods", "paired"} <= found.keys()
    assert json.loads((folder / "results.json").read_text()) == found
    methods = found["methods"]
    assert list(methods) == ["truncation", "locas:rank=3", "templora-tuned:rank=2"]
    assert methods["truncation"]["relative_time"] == methods["truncation"]["relative_memory"] == 1.0
    for name, method in methods.items():
        books = method["per_book"]
        assert sorted(books) == ["it's <two>.txt", "one.txt"]
        assert method["bits_per_byte"] == pytest.approx(
            sum(b["nll"] for b in books.values()) / math.log(2) / sum(b["bytes"] for b in books.values()), rel=1e-9
        )
        if name.startswith("templora"):  # eight times as slow, so that no hiccup of the machine matters
            assert method["relative_time"] > 1
        if name != "truncation":
            assert method["relative_time"] > 0
            assert method["relative_memory"] > 1
    # Two seeds where there is something random, one where there is not.
    assert [m["seeds"] for m in methods.values()] == [[0], [0], [0, 1]]
    one, two = methods["templora-tuned:rank=2"]["per_book"]["one.txt"]["bits_per_byte_of_seeds"]
    assert one != two
    assert methods["templora-tuned:rank=2"]["per_book"]["one.txt"]["bits_per_byte"] == pytest.approx((one + two) / 2)
    pairs = {(p["method"], p["minus"]): p for p in found["paired"]}
    assert len(pairs) == 3
    pair = pairs["locas:rank=3", "truncation"]
    bits = [{b: x["bits_per_byte"] for b, x in methods[m]["per_book"].items()} for m in ("locas:rank=3", "truncation")]
    assert pair["per_book"] == {b: pytest.approx(bits[0][b] - bits[1][b]) for b in bits[0]}
    assert pair["low"] <= pair["mean"] <= pair["high"]


def test_the_text_and_the_ends_of_its_tokens_are_kept(evaluated: tuple[Path, dict[str, Any]], library: Path) -> None:
    folder, found = evaluated
    for book in found["books"]:
        text, ends = load_text(folder / book["text"])
        whole = (library / book["name"]).read_bytes()
        assert whole.startswith(text)
        assert len(text) == book["bytes"] == ends[-1]
        backbone = load_backbone()
        ids, _ = backbone.encode(whole.decode(), 70)
        assert ends.numel() == book["tokens"] == ids.numel()
        for n in (1, 7, 13, ids.numel()):
            assert int(ends[n - 1]) == backbone.encode(whole.decode(), n)[1]


def test_the_page_opens_offline_and_no_text_becomes_markup(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = evaluated
    page = (folder / "report.html").read_text()
    assert NASTY not in page
    shown = [html.unescape(re.sub("<[^>]*>", "", t)) for t in re.findall('<p class="text">(.*?)</p>', page, flags=re.S)]
    assert len(shown) == 2
    assert any(NASTY in t for t in shown)
    assert "it&#x27;s &lt;two&gt;.txt" in page
    markup = re.sub("<script[^>]*>.*?</script>", "", page, flags=re.S)  # each ends where it should, and has no src
    assert not re.search(r"<script|</script|<link|<img|src=|href=", markup)
    assert not re.search(r"<script[^>]*src", page.replace(NASTY, ""))
    names = re.findall(r"class='chart' id='([a-z-]+)'", page)
    assert names == [
        "along", "against-truncation", "against-others", "cost-time", "cost-parameters", "words", "norms",
    ]  # fmt: skip
    for name in names:
        picture = (folder / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n")
        assert len(picture) > 5_000
        (spec,) = re.findall(f"id='{name}-spec'>(.*?)</script>", page, flags=re.S)
        assert json.loads(spec)["width"] == "container"


def test_what_is_there_is_not_measured_again(
    evaluated: tuple[Path, dict[str, Any]],
    library: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, before = evaluated
    monkeypatch.setattr("locas.evaluate.provenance._commit", lambda: ("a later one", False))
    times = {p: p.stat().st_mtime_ns for p in (folder / "losses").iterdir()}
    assert len(times) == 2 * 4
    more = [*ARGS[:1], ARGS[1] + ",dynamic", *ARGS[2:], "--max-tokens", "70", "--seeds", "0,1", "--json"]
    assert locas.cli.main(["eval", "books", str(library), *more, "-o", str(folder)]) == 0
    shown = capsys.readouterr()
    after = json.loads(shown.out)
    assert "8 of 10 measurements are there already" in shown.err
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert {k: after["methods"][k] for k in before["methods"]} == before["methods"]
    assert list(after["methods"]) == [*before["methods"], "dynamic"]
    assert after["methods"]["dynamic"]["cost_of_before"]  # truncated reading was measured at another commit


def test_memory_is_taken_from_beginnings(evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, found = evaluated
    truncation, ours, theirs = found["methods"]
    shorter = json.loads(json.dumps(found)) | {"commit": "a later one"}
    for book in shorter["books"]:
        book["tokens"] = 64
    for label in (truncation, ours, theirs):
        for on in shorter["methods"][label]["per_book"].values():
            on |= {"peak_bytes": 3_000_000, "relative_memory": 3.0, "relative_time": 9.0}
    shorter["methods"][truncation]["cost_of_before"] = True
    shorter["settings"]["methods"][theirs]["seeds"] = "others"
    made = with_memory_of(found, shorter)
    assert made["memory_measured"] == {"commit": "a later one", "tokens": 64, "methods": [ours]}
    assert made["methods"][ours]["peak_bytes"] == 3_000_000
    assert made["methods"][ours]["relative_memory"] == 3.0
    assert made["methods"][ours]["relative_time"] == found["methods"][ours]["relative_time"]
    assert {k: made["methods"][k] for k in (truncation, theirs)} == {
        k: found["methods"][k] for k in (truncation, theirs)
    }
    shorter["books"][0]["sha256"] = "another"
    with pytest.raises(ValueError, match="there is no beginning of"):
        with_memory_of(found, shorter)


def test_a_method_is_added_to_earlier_results(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, found = evaluated

    def only(*names: str) -> dict[str, Any]:
        report = json.loads(json.dumps(found))
        report["methods"] = {name: report["methods"][name] for name in names}
        report["settings"]["methods"] = {name: report["settings"]["methods"][name] for name in names}
        report["paired"] = [p for p in found["paired"] if {p["method"], p["minus"]} <= {*names}]
        return report

    truncation, ours, theirs = found["methods"]
    later, earlier = only(truncation, ours), only(truncation, theirs)
    assert joined(earlier, later, [truncation, ours]) == found
    marked = joined(earlier | {"commit": "of before"}, later)["methods"]
    assert [name for name, method in marked.items() if method.get("cost_of_before")] == [theirs]
    assert differences_picture(joined(earlier, later)).startswith(b"\x89PNG")
    assert list(joined(earlier, later)["methods"]) == [truncation, theirs, ours]

    earlier["methods"][truncation]["per_book"]["one.txt"]["bits_per_byte"] += 0.001
    with pytest.raises(ValueError, match=r"truncation needs .* on one.txt in one and .* in the other"):
        joined(earlier, later)
    earlier["books"][0]["tokens"] -= 1
    with pytest.raises(ValueError, match="the books differ"):
        joined(earlier, later)
    with pytest.raises(ValueError, match="backbone is"):
        joined(later, later | {"backbone": later["backbone"] | {"name": "other"}})


def test_books_that_were_read_apart_are_put_together(evaluated: tuple[Path, dict[str, Any]]) -> None:
    _, found = evaluated

    def only(name: str) -> dict[str, Any]:
        report = json.loads(json.dumps(found))
        report["books"] = [book for book in report["books"] if book["name"] == name]
        for method in report["methods"].values():
            method["per_book"] = {name: method["per_book"][name]}
            method["undone"] = 0
        return report

    one, two = (only(book["name"]) for book in found["books"])
    assert together([two, one]) == found
    assert together([found]) == found
    with pytest.raises(ValueError, match="a book is in two of them"):
        together([one, found])
    two["settings"]["methods"]["truncation"]["read"]["window"] += 1
    with pytest.raises(ValueError, match="settings differ"):
        together([one, two])


def test_a_stopped_run_goes_on(library: Path, tmp_path: Path) -> None:
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    book = Book.of(document, backbone, 100)
    methods = [Method.parse("locas:rank=2")]
    settings = ReadSettings(window=64, chunk=32)
    run = BooksRun(backbone, [book], tmp_path, methods, settings)
    assert [m.label for m in run.methods] == ["truncation", "locas:rank=2"]
    for progress in run:
        if progress.unit.method.name == "locas":
            break
    assert [u.method.name for u in run.missing] == ["locas"]
    again = BooksRun(backbone, [book], tmp_path, methods, settings)
    assert {p.unit.method.name for p in again} == {"locas"}
    assert again.missing == []
    other = BooksRun(backbone, [book], tmp_path, methods, ReadSettings(window=64, chunk=16))
    assert len(other.missing) == 2  # other windows are other measurements


def test_a_beginning_is_taken_from_a_longer_reading(library: Path, tmp_path: Path) -> None:
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    methods = [Method.parse(m) for m in ("locas:rank=2", "templora-tuned:rank=2")]

    def run(folder: str, tokens: int) -> BooksRun:
        book = Book.of(document, backbone, tokens)
        return BooksRun(backbone, [book], tmp_path / folder, methods, ReadSettings(window=64, chunk=32))

    for folder, tokens in (("one", 170), ("other", 150), ("one", 40)):
        for _ in run(folder, tokens):
            pass
    assert len(list((tmp_path / "one" / "losses").iterdir())) == 3
    cut, own = run("one", 150), run("other", 150)
    assert list(cut) == own.missing == []
    for one, other in zip(cut.units, own.units, strict=True):
        short, expected = cut.losses(one), own.losses(other)
        assert short.stops == expected.stops == [32, 64, 96, 128, 150]
        torch.testing.assert_close(short.nll, expected.nll, rtol=1e-4, atol=1e-4)
        assert 0 < short.seconds < cut.losses(replace(one, book=Book.of(document, backbone, 160))).seconds
        assert short.relative_time > 0
        assert short.undone == 0
        assert not any(name.startswith("slots.") for name in short.tensors)
    (tmp_path / "one" / "results.json").write_text(json.dumps(finite(results(cut))))
    assert "<h2>Slots" not in write_report(tmp_path / "one").read_text()
    assert [len(run("one", n).missing) for n in (170, 171)] == [0, 3]


def test_chunk_means_are_over_the_same_chunks_for_a_method_that_writes_more_often(
    library: Path, tmp_path: Path
) -> None:
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    methods = [Method.parse("locas:rank=2")]
    run = BooksRun(backbone, [Book.of(document, backbone, 100)], tmp_path, methods, ReadSettings(window=64))
    for _ in run:
        pass
    truncation, ours = (run.losses(unit) for unit in run.units)
    assert truncation.stops == [32, 64, 96, 100]
    assert ours.stops == [*range(8, 100, 8), 100]
    for label, losses in (("truncation", truncation), ("locas:rank=2", ours)):
        means = [
            math.exp(float(losses.nll[a:b].double().nanmean())) for a, b in ((0, 32), (32, 64), (64, 96), (96, 100))
        ]
        found = results(run)["methods"][label]
        assert found["perplexity_chunk_mean"] == pytest.approx(sum(32 * m for m in means[:3]) / 100 + means[3] * 0.04)


def test_the_mean_curve_goes_as_far_as_half_of_the_books(library: Path, tmp_path: Path) -> None:
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    books = [replace(Book.of(document, backbone, n), name=f"{n}.txt") for n in (40, 100, 170)]
    run = BooksRun(backbone, books, tmp_path, [], ReadSettings(window=64, chunk=32))
    for _ in run:
        pass
    (tmp_path / "results.json").write_text(json.dumps(finite(results(run))))
    page = write_report(tmp_path).read_text()
    name = "the 2 longest books"
    (spec,) = re.findall("id='along-spec'>(.*?)</script>", page, flags=re.S)
    rows = json.loads(spec)["data"]["values"]
    curve = {r["tokens"]: r["perplexity"] for r in rows if r["book"] == name}
    losses = [run.losses(unit).nll.double() for unit in run.units[1:]]
    expected = {t: math.exp(sum(float(nll[t - 32 : t].mean()) for nll in losses) / 2) for t in (32, 64, 96)}
    assert curve == pytest.approx(expected)
    assert {r["book"] for r in rows} == {name, "40.txt", "100.txt", "170.txt"}


def test_marks_are_reported_for_the_books_that_are_so_long(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locas.evaluate.books_figures.MARKS_TOKENS", (30, 64, 71))
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    books = [Book.of(document, backbone, 70), replace(Book.of(document, backbone, 40), name="short")]
    run = BooksRun(backbone, books, tmp_path, [], ReadSettings(window=64, chunk=32))
    for _ in run:
        pass
    (plain,) = results(run)["methods"].values()
    assert [(mark, m["books"], m["tokens"]) for mark, m in plain["at"].items()] == [("30", 2, 60), ("64", 1, 64)]
    nll = run.losses(run.units[0]).nll.double()
    n_bytes = backbone.encode(document.text, 64)[1]
    assert plain["at"]["64"]["bits_per_byte"] == pytest.approx(float(nll[:64].sum()) / math.log(2) / n_bytes, rel=1e-9)
    chunks = [math.exp(float(nll[a:b].mean())) for a, b in ((0, 32), (32, 64))]
    assert plain["at"]["64"]["perplexity_chunk_mean"] == pytest.approx(sum(chunks) / 2, rel=1e-9)
    assert "64" not in plain["per_book"]["short"]["at"]


def test_a_damaged_or_foreign_file_of_losses_is_refused(library: Path, tmp_path: Path) -> None:
    backbone = load_backbone()
    document = Document("one.txt", (library / "one.txt").read_text(), "utf-8", "0" * 64)
    run = BooksRun(backbone, [Book.of(document, backbone, 40)], tmp_path, [], ReadSettings(window=64, chunk=32))
    for _ in run:
        pass
    (unit,) = run.units
    assert run.losses(unit).relative_time == 1.0
    found = load_losses(unit.path)
    save_tensors(unit.path, found.tensors, found.manifest | {"key": "another"})
    with pytest.raises(ValueError, match="holds another measurement; move it away"):
        run.losses(unit)
    unit.path.write_bytes(unit.path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="Nothing was loaded"):
        run.losses(unit)


def test_wrong_input_is_explained(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--methods", "lorca"], "there is no method 'lorca'; there are truncation, attention, locas"),
        (["--methods", " , "], "--methods names no method"),
        (["--methods", "locas,locas"], "the method 'locas' is given twice"),
        (["--methods", "locas:rank"], "the option 'rank' in 'locas:rank' is not understood"),
        (["--seeds", "1,x"], "--seeds '1,x' is not understood"),
        (["--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["--pg19", "all"], "PG-19 has no split 'all'"),
        (["-o", str(library / "one.txt")], "is a file; -o names a folder"),
    ]
    for more, message in cases:
        assert locas.cli.main(["eval", "books", str(library), *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert locas.cli.main(["report", str(tmp_path)]) == 2
    assert "give the folder that `locas eval books -o` wrote" in " ".join(capsys.readouterr().err.split())


def test_pg19_rows_become_books_with_names_of_their_own() -> None:
    rows = [
        {"short_book_title": "Emma", "text": "One\r\ntwo"},
        {"short_book_title": "Emma", "text": "Three"},
        {"url": "http://x/4", "text": "Four"},
        {"text": "Five"},
    ]
    books = from_rows(rows)
    assert [b.name for b in books] == ["Emma", "Emma (2)", "http://x/4", "book 3"]
    assert books[0].text == "One\ntwo"
    assert pg19("test", max_books=0) == []


# -------------------------------------------------------------------- words, by hand

TEXT = "The cat. A cat!\nÄ".encode()  # tokens: "The" " cat" "." " A" " ca" "t" "!" "\n" "Ä"
ENDS = torch.tensor([3, 7, 8, 10, 13, 14, 15, 16, 18])
PLAIN = torch.tensor([math.nan, 5.0, 1.0, 1.0, 3.0, 1.0, 0.5, 0.25, 4.0])
LEARNT = torch.tensor([math.nan, 1.0, 1.0, 2.0, 0.5, 0.5, 0.5, 0.25, 3.0])


def test_a_words_gain_is_that_of_its_tokens() -> None:
    words = top_words(TEXT, ENDS, PLAIN, LEARNT, 9)
    assert [w.word for w in words] == ["cat", "Ä", "A"]  # "The" was not scored
    cat = words[0]
    assert (cat.count, cat.before, cat.after) == (2, (6.0 + 4.5) / 2, (2.0 + 1.5) / 2)
    assert cat.gain == pytest.approx(7.0)
    assert words[2].gain == -1.0
    assert top_words(TEXT, ENDS, PLAIN, LEARNT, 1) == words[:1]


def test_coloured_text_is_the_text() -> None:
    shown = coloured(TEXT, ENDS, PLAIN, LEARNT, 0, 9)
    assert re.sub("<[^>]*>", "", shown).encode() == TEXT
    assert shown.startswith("The<span")
    assert '<span style="background:rgba(42,157,111,1.00)" title="5.00 nats without, 1.00 with"> cat</span>' in shown
    assert "rgba(224,142,27,0.33)" in shown  # " A" is worse by 1 of 3 nats


def test_the_best_stretch_is_found_in_the_last_two_thirds() -> None:
    gain = torch.tensor([9.0, 9.0, 0.0, 0.0, 1.0, math.nan, 2.0, 0.0, 0.0])
    assert best_stretch(gain, 3) == (4, 7)
    assert best_stretch(gain, 99) == (0, 9)
