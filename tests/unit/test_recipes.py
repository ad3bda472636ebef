"""Recipes whose result files grow row by row: what is known is not measured again, and nothing is mixed or lost."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))
import _rows
import _setup
import compress
import sweep
import tune_baselines

import locas

HERE = {
    "commit": "now",
    "backbone": {"name": "tiny-glu", "weights_sha256": "aaaa", "tokenizer_sha256": "tttt"},
    "versions": {"locas": "1.2.3", "torch": "4.5.6", "python": "3.11"},
}
OTHERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda x: x["backbone"].update(weights_sha256="bbbb"), "weights_sha256 is bbbb there and aaaa here"),
    (lambda x: x["backbone"].update(tokenizer_sha256="uuuu"), "tokenizer_sha256 is uuuu there and tttt"),
    (lambda x: x["versions"].update(locas="1.2.2"), r"locas is 1\.2\.2 there and 1\.2\.3 here"),
    (lambda x: x["versions"].update(torch="4.5.5"), r"torch is 4\.5\.5 there and 4\.5\.6 here"),
    (lambda x: x.pop("backbone"), "weights_sha256 is not noted there and aaaa here"),
]


def copy(report: Any) -> Any:
    return json.loads(json.dumps(report))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A folder with one short book."""
    folder = tmp_path / "books"
    folder.mkdir()
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    marks = [f"*** {end} OF THE PROJECT GUTENBERG EBOOK A ***" for end in ("START", "END")]
    (folder / "a.txt").write_text(f"{marks[0]}\n\n{text[2000:6000]}\n\n{marks[1]}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("spoil", "says"), OTHERS)
def test_a_result_file_of_another_backbone_or_version_is_not_gone_on_with(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], says: str
) -> None:
    path = tmp_path / "r.json"
    assert _setup.resumed(path, HERE) == {"results": []}
    report = copy(HERE) | {"results": [{"what": "x"}]}
    report["versions"]["python"] = "3.12"
    report["commit"] = "before"
    path.write_text(json.dumps(report), encoding="utf-8")
    assert _setup.resumed(path, HERE) == report
    spoil(report)
    path.write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"r\.json cannot be gone on with: {says}.*Give another --results, or move"):
        _setup.resumed(path, HERE, "--results")
    path.write_text(json.dumps(report | {"results": []}), encoding="utf-8")
    assert _setup.resumed(path, HERE)["results"] == []  # it has nothing that could be mixed with


def spoiled(path: Path) -> bytes:
    """The result file, made to be of another backbone of the same name."""
    report = json.loads(path.read_bytes())
    report["backbone"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(report), encoding="utf-8")
    return path.read_bytes()


def test_a_sweep_goes_on_with_its_own_backbone_only(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep.json"
    small = sweep.Entry("small", sweep.INIT(rank=2), sweep.READ(window=64, chunk=32))
    monkeypatch.setattr(sweep, "grids", lambda: {"small": [small]})
    arguments = ["sweep.py", str(book), "--grid", "small", "--max-tokens", "100", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert sweep.main() == 0
    report = json.loads(output.read_bytes())
    assert [row["settings"]["name"] for row in report["results"]] == ["truncated reading", "small"]
    assert {row["commit"] for row in report["results"]} == {report["commit"]}
    capsys.readouterr()
    assert sweep.main() == 0
    assert "nats" not in capsys.readouterr().out
    assert json.loads(output.read_bytes()) == report
    before = spoiled(output)
    with pytest.raises(SystemExit, match=r"sweep\.json cannot be gone on with: weights_sha256 is 000"):
        sweep.main()
    assert output.read_bytes() == before


def test_rows_are_known_by_their_backbones_weights(book: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    args = _rows.parser(None, str(output)).parse_args([str(book), "--rank", "2", "--read-tokens", "64"])
    seen: list[list[str]] = []

    def rows(books: _rows.Books, _args: Namespace, known: list[_rows.Row]) -> Any:
        seen.append([row["what"] for row in known])
        yield {"what": f"row {len(seen)}", "book": books.names[0]}

    def go() -> int:
        return _rows.run(args, "test", rows, lambda report: "")

    assert (go(), go(), seen) == (0, 0, [[], ["row 1"]])
    report = json.loads(output.read_bytes())
    weights = report["backbone"]["weights_sha256"]
    assert [(row["weights_sha256"], row["commit"]) for row in report["results"]] == [(weights, report["commit"])] * 2
    report["results"] = [report["results"][0] | {"weights_sha256": "another"}]
    for key in ("weights_sha256", "commit"):  # rows of before they said so are of the file's backbone
        report["results"].append({k: v for k, v in report["results"][0].items() if k != key} | {"what": f"no {key}"})
    output.write_text(json.dumps(report), encoding="utf-8")
    assert (go(), seen[-1]) == (0, ["no weights_sha256"])
    before = spoiled(output)
    with pytest.raises(SystemExit, match="cannot be gone on with"):
        go()
    assert (output.read_bytes(), len(seen)) == (before, 3)


def test_tables_do_not_mix_backbones() -> None:
    place = {"rank": 2, "skip_tokens": 0, "read_tokens": 64, "later_tokens": 32, "backbone": "tiny-glu"}
    rows = [place | {"weights_sha256": w * 32, "n": n} for n, w in enumerate(("ab", "cd", "ab"))]
    found = _rows.by_place(rows)
    what = "rank 2, 64 tokens of each book, 32 that follow"
    assert [where for where, _ in found] == [f"{what}, backbone tiny-glu {w}" for w in ("abababab", "cdcdcdcd")]
    assert [[row["n"] for row in some] for _, some in found] == [[0, 2], [1]]
    assert _rows.by_place(rows[:1]) == [(what, rows[:1])]
    other = place | {"backbone": "tiny-mlp"}
    assert [where for where, _ in _rows.by_place([place, other])] == [
        f"{what}, backbone tiny-glu",
        f"{what}, backbone tiny-mlp",
    ]
    assert [len(some) for _, some in _rows.by_place([place, place | {"read": {"chunk": 8}}, place])] == [2, 1]


# -------------------------------------------------------------------- compressing while reading


def test_no_row_of_the_cycle_is_scored_on_what_its_memory_was_made_from(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = locas.ReadSettings(window=46, chunk=23)
    args = _rows.parser(None, "").parse_args([str(book), "--rank", "3", "--read-tokens", "97", "--later-tokens", "1"])
    books = _rows.Books(locas.load_backbone(device="cpu"), [book / "a.txt"], args, read)
    ids, settings, seen, create = books.read_part("a"), books.settings, [], locas.create

    def watched(model: Any, text: torch.Tensor, *more: Any, **named: Any) -> Any:
        assert torch.equal(text, ids[: text.numel()])
        seen.append(text.numel())
        return create(model, text, *more, **named)

    monkeypatch.setattr(locas, "create", watched)
    rows = list(compress.cycle(books, "a", args, []))
    first = 3 + 23  # the capacity: what is left after compressing, and a chunk
    assert {row["scored_from"] for row in rows} == {first}
    assert seen == [26, 23, 23, 23, 26, 26]
    nll = torch.cat([r.nll for r in locas.read(books.backbone.model, None, ids, settings, start_id=0)]).double()
    assert nll.numel() == 97
    plain, *others = [row["nats"] for row in rows]
    assert plain == pytest.approx(float(nll[first:].mean()), rel=1e-6)
    assert all(abs(nats - plain) > 1e-6 for nats in others)
    books.read_tokens = 26
    with pytest.raises(SystemExit, match="nothing of a is scored: 26 tokens go before; use more with --read-tokens"):
        next(compress.cycle(books, "a", args, []))


def test_rows_of_before_are_measured_again_and_tabled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [{"book": "a", "part": "cycle", "what": "none"}]
    known += [{"book": "a", "part": "cycle", "what": "nl-svd cycle", "scored_from": 7}]
    asked: list[list[str]] = []
    monkeypatch.setattr(compress, "cycle", lambda books, book, args, done: iter(asked.append(done) or []))
    assert list(compress.rows(Namespace(names=["a"]), Namespace(part=["cycle"]), known)) == []
    assert asked == [["nl-svd cycle"]]
    place = {
        "rank": 2,
        "skip_tokens": 0,
        "read_tokens": 64,
        "later_tokens": 32,
        "backbone": "tiny-mlp",
        "part": "cycle",
    }
    rows = [
        place | {"book": "a", "what": what, "nats": nats, "slots": 5, "seconds": 1.0} | more
        for more, nats_of in (({}, (4.0, 3.0)), ({"scored_from": 7}, (4.0, 3.5)))
        for what, nats in zip(("none", "nl-svd cycle"), nats_of, strict=True)
    ]
    apart, before = compress.table({"results": rows}).split("### ")[1:]
    assert "after the first 7 tokens" in apart
    assert "-0.5000" in apart
    assert "a few tokens of the second chunk" in before
    assert "-1.0000" in before


# -------------------------------------------------------------------- the baselines' settings


def test_tuning_keeps_what_is_not_measured_again_and_mixes_nothing(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "tune.json"
    monkeypatch.setattr(tune_baselines, "grid", lambda: iter(["truncation", "dynamic:lr=0.0001:steps=1"]))

    def go(*more: str) -> Any:
        common = ["--books", "a", "-o", str(tmp_path / "runs"), "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["tune_baselines.py", str(book), *common, "--max-tokens", "40", *more])
        assert tune_baselines.main() == 0
        return json.loads(results.read_bytes())

    assert [row["method"] for row in go("--only", "dynamic")["results"]] == ["dynamic:lr=0.0001:steps=1"]
    report = go("--only", "truncation")
    assert set(report["means"]) == {"dynamic:lr=0.0001:steps=1", "truncation"}
    report["results"].append(report["results"][0] | {"method": "dynamic:lr=0.5:steps=1", "bits_per_byte": None})
    results.write_text(json.dumps(report), encoding="utf-8")
    again = go()
    assert sorted(row["method"] for row in again["results"]) == sorted(row["method"] for row in report["results"])
    assert again["chosen"]["dynamic"] == "dynamic:lr=0.0001:steps=1"
    with pytest.raises(SystemExit, match=r"was measured with .*'max_tokens': 40}, not .*'max_tokens': 39}"):
        go("--max-tokens", "39")
    before = spoiled(results)
    with pytest.raises(SystemExit, match=r"cannot be gone on with.*Give another --results"):
        go()
    assert results.read_bytes() == before


def test_what_is_at_the_edge_of_what_was_tried() -> None:
    tried = [f"dynamic:lr={lr}:steps={steps}" for lr in ("0.1", "0.2", "0.3") for steps in (1, 2)]
    assert tune_baselines.edges("dynamic:lr=0.2:steps=1", tried) == []
    assert tune_baselines.edges("dynamic:lr=0.3:steps=2", tried) == ["lr above 0.3", "steps above 2"]
    assert tune_baselines.edges("dynamic:lr=0.1:steps=1", tried) == ["lr below 0.1"]
    more = [*tried, "dynamic:lr=0.4:steps=1", "ffn-inplace:lr=0.9:steps=2"]  # neither says what 0.4 does in two steps
    assert tune_baselines.edges("dynamic:lr=0.3:steps=2", more) == ["lr above 0.3", "steps above 2"]
    assert tune_baselines.edges("dynamic:lr=0.3:steps=1", more) == []
    # What is not said is the method's own: two steps.
    own = ["templora-tuned:lr=0.1", *(f"templora-tuned:lr=0.1:steps={n}" for n in (1, 3))]
    assert tune_baselines.edges(own[0], own) == ["lr above 0.1", "lr below 0.1"]


def test_the_table_says_what_is_at_the_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means = {"truncation": 1.5, "dynamic:lr=0.1:steps=1": 1.4, "dynamic:lr=0.2:steps=1": None}
    chosen = {"truncation": "truncation", "dynamic": "dynamic:lr=0.1:steps=1"}
    (tmp_path / "r.json").write_text(json.dumps({"results": [], "means": means, "chosen": chosen}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tune_baselines.py", "--table", "--results", str(tmp_path / "r.json")])
    assert tune_baselines.main() == 0
    assert capsys.readouterr().out == (
        "1.4000  dynamic:lr=0.1:steps=1  * at the edge: no lr below 0.1, no steps above 1 was tried\n"
        "1.5000  truncation  *\n"
        "inf  dynamic:lr=0.2:steps=1\n"
    )
