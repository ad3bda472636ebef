"""The recipe that trains the built-in backbones, at a size of seconds: what it draws, learns, saves and packs."""

from __future__ import annotations

import json
import lzma
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import same_bytes

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))

from pretrain import evaluate, export, main, overlap, prepare
from pretrain.batches import Batches, spread
from pretrain.books import FORMS, STYLES, Book, files, form_of, prepared, read_books, style_of, typeset
from pretrain.optimiser import Optimiser, learning_rate
from pretrain.settings import MODELS, PRESETS, Preset
from pretrain.state import Run, start
from pretrain.train import cut, mean_loss, train
from pretrain.twins import build, n_parameters

TINY = Preset(
    "tiny", d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_ff_glu=22, context=19, tokens=20 * 19 * 6, batch=6,
    micro_batch=2, log_every=5, valid_every=10, valid_windows=3, warmup=0.2,
)  # fmt: skip
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
WORDS = [
    "whale",
    "ship",
    "sea",
    "the",
    "of",
    "and",
    "old",
    "ran",
    "home",
    "to",
    "her",
    "house",
    "captain",
    "letter",
    "road",
]


def _text(seed: int, n_words: int = 900) -> str:
    """Sentences of drawn words, wrapped at 70 columns, a blank line between paragraphs."""
    rng = np.random.default_rng(seed)
    lines, line = [], ""
    for i, word in enumerate(rng.choice(WORDS, n_words)):
        line += f' "{word}--it\'s"' if i % 31 == 30 else f" {word}"
        if len(line) > 70 or i % 97 == 96:
            lines.append(line.strip())
            line = ""
            if i % 97 == 96:
                lines.append("")
    return "\n".join([*lines, line.strip(), "THE END."])


def _book(seed: int) -> Book:
    text = _text(seed)
    return Book(f"train-0:{seed}", text, f"{seed:064x}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few books, prepared once."""
    source, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
    for name, seeds in (("train-0", range(5)), ("train-1", range(5, 9)), ("valid", range(20, 22))):
        text = "\n\f\n".join(_text(seed) for seed in seeds)
        (source / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    prepare.prepare(source, out, share=1.0, seed=0, drop=frozenset({"train-1:2"}), vocab=300)
    return out


# ---------------------------------------------------------------- text


def test_form_and_style_depend_on_text_and_seed_alone() -> None:
    books = [_book(seed) for seed in range(400)]
    elsewhere = [Book("train-5:1", book.text, book.sha256) for book in books]
    for draw in (form_of, style_of):
        assert [draw(b, 0) for b in books] == [draw(b, 0) for b in elsewhere]
        assert [draw(b, 0) for b in books] != [draw(b, 1) for b in books]
    # Within four standard deviations of the shares that were asked for.
    assert abs(sum(form_of(b, 0) == FORMS[0] for b in books) - 200) < 4 * 10
    for style, share in STYLES:
        assert abs(sum(style_of(b, 0) == style for b in books) - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5
    assert sum(share for _, share in STYLES) == pytest.approx(1)


@pytest.mark.parametrize(
    ("plain", "typographic"),
    [
        ('"Tis late," he said--"isn\'t it?"', "“Tis late,” he said—“isn’t it?”"),
        ("'Tis the boys' 'den', o' course", "’Tis the boys’ ‘den’, o’ course"),
        ('("A," said _"B"_)', "(“A,” said _“B”_)"),
        ("he said, \"'Go,' cried she--\"", "he said, “‘Go,’ cried she—”"),
        ("in '61----no -- --- -----", "in ’61——no — --- -----"),
        ('"One.\n"Two."', "“One.\n“Two.”"),
    ],
)
def test_typography(plain: str, typographic: str) -> None:
    assert typeset(plain, "curly quotes and dashes") == typographic
    assert typeset(plain, "plain") == plain
    assert "'" not in typeset(plain, "curly quotes")
    assert "--" in typeset('a--"b\'s"', "curly quotes")
    assert typeset('a--"b\'s"', "curly double quotes") == "a--“b's”"


def test_prepared_forms() -> None:
    book = next(b for b in map(_book, range(99)) if style_of(b, 0) == "plain")
    assert prepared(book, 0, form="wrapped") == book.text
    joined = prepared(book, 0, form="reflowed")
    assert joined.count("\n") < book.text.count("\n") / 3
    assert joined.split() == book.text.split()
    assert prepared(book, 0) in (book.text, joined)


def test_overlap_finds_what_was_planted() -> None:
    evaluated = {"dev/1": _words("a", 400), "test/2": _words("b", 400)}
    quoting = Book("train-0:0", _words("c", 500) + "\n" + " ".join(evaluated["dev/1"].split()[50:63]), "")
    copying = Book("train-0:1", _words("d", 99) + "\n" + evaluated["test/2"].upper().replace(" ", ",\n", 70), "")
    clean = Book("train-0:2", _words("e", 500), "")
    found = overlap.check([quoting, copying, clean], evaluated)
    assert found["drop"] == ["train-0:1"]
    assert found["evaluation"]["dev/1"] == {"grams": 388, "in_training": 1, "share": round(1 / 388, 6)}
    assert found["evaluation"]["test/2"]["in_training"] == 0  # its copy is dropped
    worst = found["books"][0]
    assert (worst["source"], worst["worst"], worst["worst_grams"]) == ("train-0:1", "test/2", 388)
    assert [b["source"] for b in found["books"]] == ["train-0:1", "train-0:0"]
    assert "drop train-0:1" in overlap.table(found)


def _words(prefix: str, n: int) -> str:
    return " ".join(f"{prefix}{i}" for i in range(n))


def test_no_evaluation_book_in_a_sample_of_the_real_training_text() -> None:
    if not (SHARED / "pretrain").is_dir():
        pytest.skip("../shared is absent; `main.py check` does this for all of the text where it is there")
    texts = overlap.evaluation_texts(SHARED / "books")
    chosen = {name: texts[name] for name in ("dev/2701", "test/9315")}
    some = read_books(files(SHARED / "pretrain", "valid")[0])
    found = overlap.check(some, chosen)
    assert found["drop"] == []
    assert all(row["share"] < overlap.THRESHOLD for row in found["evaluation"].values())


# ---------------------------------------------------------------- tokens


def test_shards_hold_every_book_behind_a_start_token(data: Path) -> None:
    manifest = prepare.load_manifest(data)
    ids = prepare.load_split(data, "train")
    books = [b for b in manifest["books"] if b["source"].startswith("train")]
    assert len(books) == 8  # of nine, one was dropped
    assert "train-1:2" not in {b["source"] for b in books}
    starts = np.cumsum([0, *(b["tokens"] for b in books)])
    assert starts[-1] == ids.size
    assert np.array_equal(np.flatnonzero(ids == 0), starts[:-1])
    assert ids.max() < manifest["vocab"] <= 300
    assert [b["form"] for b in manifest["books"] if b["source"].startswith("valid")] == [f for f in FORMS for _ in "ab"]
    assert prepare.summary(manifest).count("\n") >= 4


def test_packing_round_trip_and_damage(data: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 2**15, 1013).astype(np.uint16)
    assert np.array_equal(prepare.unpack(prepare.pack(ids)), ids)
    for path in data.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train-0.u16.xz").write_bytes(prepare.pack(ids))
    with pytest.raises(ValueError, match="not the shard in manifest"):
        prepare.load_split(tmp_path, "train")
    (tmp_path / "train-0.u16.xz").unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole of"):
        prepare.load_split(tmp_path, "train")


def test_an_epoch_deals_every_window_once_and_the_order_is_a_function_of_seed_and_step() -> None:
    ids = np.arange(1009, dtype=np.uint16)
    batches = Batches(ids, 11, 7, CPU)
    n = batches.per_epoch
    epoch = batches.take(0, n)
    assert epoch.shape == (n, 12)
    assert torch.equal(epoch[:, 1:], epoch[:, :-1] + 1)  # neighbours in the text, whose ids count up
    starts = sorted(epoch[:, 0].tolist())
    assert [b - a for a, b in pairwise(starts)] == [11] * (n - 1)
    over_the_edge = Batches(ids, 11, 7, CPU).take(n - 3, 7)
    assert torch.equal(over_the_edge[:3], epoch[-3:])
    assert torch.equal(over_the_edge[3:], batches.take(n, 4))
    assert not torch.equal(Batches(ids, 11, 8, CPU).take(0, n), epoch)
    with pytest.raises(ValueError, match="do not fill two windows"):
        Batches(ids[:20], 11, 7, CPU)
    assert spread(ids, 11, 3, CPU)[:, 0].tolist() == [0, 498, 997]


# ---------------------------------------------------------------- models and optimiser


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_twins_have_equally_many_parameters(preset: Preset) -> None:
    with torch.device("meta"):
        glu, mlp = (n_parameters(build(name, preset, prepare.VOCAB)) for name in MODELS)
    assert glu == mlp
    if preset.name == "gpu":
        assert 25e6 < glu < 30e6
        assert 2 * glu < 64 * 2**20  # bytes in bfloat16


def test_twins_are_stock_and_seeded() -> None:
    for name, family in zip(MODELS, ("Qwen3ForCausalLM", "ApertusForCausalLM"), strict=True):
        one, two, other = build(name, TINY, 53), build(name, TINY, 53), build(name, TINY.changed(seed=1), 53)
        assert type(one).__name__ == family
        assert all(same_bytes(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
        assert not [key for key, _ in one.named_parameters() if key.endswith("bias") and "norm" not in key]
    assert build("tiny-mlp", TINY, 53).config.hidden_act == "relu"
    with pytest.raises(ValueError, match="there is no twin 'tiny-moe'"):
        build("tiny-moe", TINY, 53)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_is_what_the_stock_model_computes(name: str, tmp_path: Path) -> None:
    ours = build(name, TINY, 53)
    ours.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa"
    ids = torch.randint(53, (2, 17), generator=torch.Generator().manual_seed(0))
    assert same_bytes(ours(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_schedule_warms_up_stays_and_decays() -> None:
    preset = TINY.changed(tokens=TINY.tokens_a_step * 20, lr=0.5)  # 4 steps up, 10 level, 6 down
    rates = [learning_rate(step, preset) for step in range(20)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4:15] == pytest.approx([0.5] * 11)
    assert rates[15:] == pytest.approx([0.5 * k / 6 for k in (5, 4, 3, 2, 1)])


def test_sequences_are_cut_until_the_rate_falls_and_no_target_is_lost() -> None:
    preset = TINY.changed(tokens=TINY.tokens_a_step * 20, context=18, stable_context=6)
    assert preset.n_stable == preset.n_steps - round(preset.decay * preset.n_steps)
    assert [preset.context_at(step) for step in (0, preset.n_stable - 1)] == [6, 6]
    assert [preset.context_at(step) for step in (preset.n_stable, preset.n_steps - 1)] == [18, 18]
    windows = torch.arange(2 * 19).view(2, 19)
    pieces = cut(windows, 6)
    assert pieces.shape == (6, 7)
    assert torch.equal(pieces[:, 1:].flatten(), windows[:, 1:].flatten())
    assert torch.equal(pieces[:, :-1] + 1, pieces[:, 1:])
    assert torch.equal(cut(windows, 18), windows)
    with pytest.raises(ValueError, match="does not divide context"):
        TINY.changed(context=18, stable_context=5)


def test_a_matrix_moves_by_the_learning_rate_and_norms_do_not_decay() -> None:
    preset = TINY.changed(warmup=0.0, lr=1e-3, decay=0.0, weight_decay=0.0)
    model = build("tiny-glu", preset, 53)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = Optimiser(model, preset)
    mean_loss(model, torch.arange(40).view(2, 20), autocast=False).backward()
    optimiser.step(0)
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).square().mean().sqrt()
        if "proj" in name:  # 0.2 sqrt(max(m, n)) U V^T; its singular values are 0.7 to 1.2, not quite 1
            # An m by n matrix of rank k with singular values 1 has entries of root mean square sqrt(k / (m n)).
            assert moved == pytest.approx(0.2e-3, rel=0.35), name
        assert p.grad is None
    embedding = model.get_input_embeddings().weight.detach()
    assert (embedding - before["model.embed_tokens.weight"]).abs().max() == pytest.approx(1e-3, rel=1e-2)
    decaying = Optimiser(model, preset.changed(weight_decay=0.1)).adamw.param_groups
    assert [group["weight_decay"] for group in decaying] == [0.1, 0.0]


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide batch"):
        TINY.changed(micro_batch=4)
    with pytest.raises(ValueError, match="less than one step"):
        TINY.changed(tokens=5)
    with pytest.raises(ValueError, match="together at most 1"):
        TINY.changed(warmup=0.8)


# ---------------------------------------------------------------- training


def _quiet(_: str) -> None:
    pass


def _weights(run: Run) -> list[torch.Tensor]:
    return [p.detach() for p in run.model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_equal_ten_and_a_resume(name: str, data: Path, tmp_path: Path) -> None:
    whole = start(name, TINY, data, tmp_path / "whole", CPU)
    fresh = [w.clone() for w in _weights(whole)]
    assert train(whole, data, say=_quiet)
    assert whole.step == 20
    first = start(name, TINY, data, tmp_path / "parts", CPU)
    assert not train(first, data, until_step=10, say=_quiet)
    second = start(name, TINY, data, tmp_path / "parts", CPU)
    assert second.step == 10
    assert train(second, data, say=_quiet)
    assert all(same_bytes(a, b) for a, b in zip(_weights(whole), _weights(second), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(_weights(whole), fresh, strict=True))
    losses = [row["loss"] for row in whole.history if "loss" in row]
    assert losses == [row["loss"] for row in second.history if "loss" in row]
    assert losses[0] <= math.log(prepare.load_manifest(data)["vocab"]) + 0.1
    assert losses[-1] < losses[0] - 0.2
    result = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert result["settings"] == TINY.as_dict()
    assert {"commit", "torch", "transformers", "device"} <= result["environment"].keys()
    assert [row["step"] for row in result["history"] if "wrapped" in row] == [10, 20]


def test_stopping_by_the_clock_and_going_on_with_other_settings(data: Path, tmp_path: Path) -> None:
    run = start("tiny-glu", TINY, data, tmp_path, CPU)
    assert not train(run, data, minutes=0.0, say=_quiet)
    assert run.step == 0
    train(run, data, until_step=15, say=_quiet)
    assert start("tiny-glu", TINY.changed(log_every=3), data, tmp_path, CPU).step == 15
    with pytest.raises(ValueError, match=r"holds a run of tiny-glu with \{'lr': 0.003\}.*another --run"):
        start("tiny-glu", TINY.changed(lr=0.1), data, tmp_path, CPU)
    with pytest.raises(ValueError, match="holds a run of tiny-glu"):
        start("tiny-mlp", TINY, data, tmp_path, CPU)
    with pytest.raises(ValueError, match="--tokens cannot change at step 15"):
        start("tiny-glu", TINY.changed(tokens=TINY.tokens * 2), data, tmp_path, CPU)


@pytest.mark.parametrize("name", MODELS)
def test_export_evaluate_split_and_join(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(name, TINY, data, tmp_path / "run", CPU)
    train(run, data, until_step=10, say=_quiet)
    folder = tmp_path / name
    export.export(tmp_path / "run", data, folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    for mine, theirs in zip(run.model.parameters(), stock.parameters(), strict=True):
        assert same_bytes(mine.detach().bfloat16(), theirs.detach())
    body = _text(50, 60)
    (tmp_path / "books").mkdir()
    book = f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{body}\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
    (tmp_path / "books" / "7.txt.xz").write_bytes(lzma.compress(book.encode()))
    monkeypatch.setattr(evaluate, "SAMPLE_TOKENS", 3)
    found = evaluate.evaluate(folder, tmp_path / "books", device="cpu", say=_quiet)
    assert [row["form"] for row in found["books"]] == list(FORMS)
    assert found["books"][0]["bytes"] == len(body) + 1
    card = (folder / "README.md").read_text()
    assert f"| 7 | {found['books'][0]['bits_per_byte']:.3f} |" in card
    (folder / "README.md").unlink()
    assert main.main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == card
    assert main.main(["split", str(folder), str(tmp_path / "pieces")]) == 0
    assert main.main(["split", str(folder), str(tmp_path / "pieces")]) == 1  # they are there already
    pieces = export.split(folder, tmp_path / "small", piece_bytes=10_007)
    assert len(pieces) > 3
    assert main.main(["join", str(tmp_path / "small"), name, str(tmp_path / "joined")]) == 0
    for path in folder.iterdir():
        assert (tmp_path / "joined" / path.name).read_bytes() == path.read_bytes()
    pieces[1].write_bytes(b"x" + pieces[1].read_bytes()[1:])
    with pytest.raises(ValueError, match=r"\.01 is damaged.*Nothing was written"):
        export.join(tmp_path / "small", name, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    warm = start(name, TINY, data, tmp_path / "warm", CPU, tmp_path / "joined")
    assert warm.step == 10
    assert all(same_bytes(a.detach().bfloat16(), b) for a, b in zip(warm.model.parameters(), stock.parameters()))  # noqa: B905
    assert "error:" in capsys.readouterr().err
