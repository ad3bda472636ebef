"""Gain against change: KL worked out by hand, nothing learnt changes nothing, the dial, measurements, MMLU's files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from families import tiny_model
from helpers import fill, same_bytes, snapshot, text
from locas.backbone import Backbone
from locas.evaluate.cells import Cells, finite, key_of
from locas.evaluate.comparison import BitExact, Comparison, compare, divergence, scaled
from locas.evaluate.forgetting import (
    Config,
    ForgettingSettings,
    Learnt,
    Unrelated,
    book,
    configs,
    measure,
    run,
    unrelated_text,
)
from locas.evaluate.learners import Locas, make
from locas.evaluate.mmlu import read_csv
from locas.stream import Reader, ReadSettings
from locas.text import Document
from tokens import tiny_backbone, words

READ = ReadSettings(window=23, chunk=11)
LN2 = math.log(2)


def backbone(family: str = "qwen3") -> Backbone:
    return tiny_backbone(tiny_model(family, torch.float64))


def read(of: Backbone, name: str, **options: Any) -> Any:
    learner = make(name, of, READ, options={"rank": 3, **options})
    for _ in learner.read(text(37)):
        pass
    return learner


# -------------------------------------------------------------------- KL


def test_divergence_is_what_is_worked_out_by_hand() -> None:
    # 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2: 1/2 ln 2 + 0 - 1/4 ln 2.
    one = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 3.0  # a constant changes no softmax
    other = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(divergence(one, other), torch.tensor([0.25 * LN2], dtype=torch.float64))
    torch.testing.assert_close(divergence(other, one), torch.tensor([0.25 * LN2], dtype=torch.float64))
    # Not symmetric: 1/2, 1/2 against 1/4, 3/4.
    one, other = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    assert float(divergence(one, other)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(divergence(other, one)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_divergence_of_equals_is_exactly_nothing_and_what_is_impossible_costs_nothing() -> None:
    logits = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)) * 30
    assert (divergence(logits, logits.clone()) == 0).all()
    never = torch.tensor([0.0, 0.0, -math.inf])
    assert float(divergence(never, torch.tensor([0.0, 0.0, 1.0]))) == pytest.approx(math.log(2 + math.e) - LN2)
    assert float(divergence(never, never)) == 0


def test_a_memory_that_says_nothing_changes_nothing_at_all() -> None:
    of = backbone()
    learner = make("locas", of, READ, options={"rank": 3})
    assert isinstance(learner, Locas)
    next(iter(learner.read(text(5))))
    assert learner.bank is not None
    for layer in learner.bank.layers:
        learner.bank.slots(layer).v.zero_()
    (found,) = compare(of, learner, text(41, seed=3), READ)
    assert found.kl == 0.0
    assert found.before == found.after
    assert found.tokens == 41


@pytest.mark.parametrize("name", ["locas", "templora-tuned", "dynamic"])
def test_comparing_scores_as_the_reader_does_and_averages_kl_over_tokens(name: str) -> None:
    of, ids, first = backbone(), text(53, seed=5), 17
    learner = read(of, name) if name != "dynamic" else make(name, of, READ, options={"lr": 0.01})
    if name == "dynamic":
        list(learner.read(text(37)))
    (found,) = compare(of, learner, ids, READ, first_token=first)

    def plain() -> list[Any]:
        return [r for (r,) in Reader(of.model, None, [ids], READ, start_id=of.start_id, first_token=first)]

    before = torch.cat([r.nll for r in plain()]).double()
    with learner.active():
        after = torch.cat([r.nll for r in plain()]).double()
    assert found.tokens == 53 - first
    assert found.before == pytest.approx(float(before.mean()), rel=1e-6)
    assert found.after == pytest.approx(float(after.mean()), rel=1e-6)
    assert found.before != found.after
    total = 0.0
    for start in range(first, 53, 11):  # windows of 23 with a start token: 22 tokens, 11 of them new
        left, stop = max(0, start + 11 - 22), min(53, start + 11)
        window = torch.cat([torch.tensor([of.start_id]), ids[left : stop - 1]])[None]
        with torch.no_grad():
            p = of.model(input_ids=window, use_cache=False).logits[0, -(stop - start) :].softmax(-1)
            with learner.active():
                q = of.model(input_ids=window, use_cache=False).logits[0, -(stop - start) :].softmax(-1)
        total += float((p * (p / q).log()).sum())
    assert found.kl == pytest.approx(total / (53 - first), rel=1e-6)
    assert found.kl > 0
    learner.close()


# -------------------------------------------------------------------- the dial


@pytest.mark.parametrize("name", ["locas", "templora-tuned", "lora-eva"])
def test_the_dial_goes_from_nothing_to_all_and_leaves_the_learner_as_it_was(name: str) -> None:
    of, ids = backbone(), text(29, seed=5)
    learner = read(of, name)
    before = [t.clone() for t in learner.tensors()]
    if name == "lora-eva":
        with pytest.raises(ValueError, match="lora-eva learnt cannot be scaled"):
            compare(of, learner, ids, READ, scales=(0.5,))
        return
    none, half, whole, again = compare(of, learner, ids, READ, scales=(0.0, 0.5, 1.0, 1.0))
    assert none.kl == 0.0
    assert none.after == none.before
    assert 0 < half.kl < whole.kl
    assert whole == again
    assert all(same_bytes(a, b) for a, b in zip(learner.tensors(), before, strict=True))


def test_half_a_memory_is_half_its_output() -> None:
    of, ids = backbone(), text(11, seed=5)
    learner = read(of, "locas")
    assert isinstance(learner, Locas)
    assert learner.bank is not None
    fill(learner.bank, seed=1)
    a = torch.randn(1, 5, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = learner.bank.read(1, a)
    with scaled(of, learner, 0.5):
        torch.testing.assert_close(learner.bank.read(1, a), whole / 2, rtol=1e-12, atol=0)
    assert same_bytes(learner.bank.read(1, a), whole)
    with pytest.raises(RuntimeError, match="inside"), scaled(of, learner, 0.5):
        raise RuntimeError("inside")
    assert same_bytes(learner.bank.read(1, a), whole)
    assert ids.numel() == 11


# -------------------------------------------------------------------- a measurement


def learnt() -> Learnt:
    return Learnt("book", text(59, seed=11), 37, "abc")


def others() -> list[Unrelated]:
    return [Unrelated(f"other {i}", text(n, seed=n), 5 * n, f"sha{i}") for i, n in enumerate((13, 31))]


def test_a_measurement_is_made_of_comparisons_and_leaves_no_trace() -> None:
    of = backbone()
    weights = snapshot(of.model)
    config = Config("locas", "locas", (("rank", 3),), 3, 1.0)
    settings = ForgettingSettings(scales=(1.0, 0.5))
    cell = measure(of, learnt(), others(), config, READ, settings)
    assert all(same_bytes(of.model.state_dict()[k], v) for k, v in weights.items())
    assert cell["bit_exact"] is True
    assert cell["tokens"] == 37
    learner = make("locas", of, READ, options={"rank": 3})
    nll = torch.cat([r.nll for r in learner.read(learnt().ids[:37])])
    assert cell["online_nll"] == pytest.approx(float(nll.double().mean()), rel=1e-12)
    for point, scale in zip(cell["points"], (1.0, 0.5), strict=True):
        (later,) = compare(of, learner, learnt().ids, READ, first_token=37, scales=(scale,))
        found = [compare(of, learner, u.ids, READ, scales=(scale,))[0] for u in others()]
        assert point["scale"] == scale
        assert point["gain"] == later.before - later.after
        assert point["later_tokens"] == 22
        assert point["kl"] == pytest.approx((found[0].kl + found[1].kl) / 2, rel=1e-12)
        bits = [(f.after - f.before) * f.tokens / LN2 / u.n_bytes for f, u in zip(found, others(), strict=True)]
        assert point["bits_per_byte_change"] == pytest.approx(sum(bits) / 2, rel=1e-9)


def test_a_learner_that_diverges_is_a_result_too() -> None:
    of = backbone()
    config = Config("dynamic", "dynamic", (("lr", 1e200),), None, 1.0)
    cell = measure(of, Learnt("book", text(89, seed=11), 67, "abc"), others(), config, READ, ForgettingSettings())
    assert "dynamic diverged at learning rate 1e+200" in cell["failed"]
    assert cell["bit_exact"] is True


def test_a_loss_that_is_not_finite_only_elsewhere_is_noticed() -> None:
    of = backbone()
    learner = read(of, "locas")
    assert isinstance(learner, Locas)
    assert learner.bank is not None
    learner.bank.rows.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="with what locas learnt, the loss is not finite"):
        compare(of, learner, text(13), READ)


def test_a_backbone_that_was_changed_is_noticed() -> None:
    of = backbone()
    check = BitExact(of, text(7))
    check("at once")
    weight = next(of.model.parameters())
    old = weight.data[3, 5].clone()
    weight.data[3, 5] += 1e-12
    with pytest.raises(RuntimeError, match="after this the backbone is not what it was"):
        check("after this")
    weight.data[3, 5] = old
    check("again")


def test_runs_keep_what_was_measured_and_ask_again_only_for_what_is_new(tmp_path: Path) -> None:
    of, settings, said = backbone(), ForgettingSettings(), []
    chosen = configs(of, ["locas"], [2, 3], [1.0], READ)

    def go(some: Any) -> dict[str, Any]:
        said.clear()
        cells = Cells(tmp_path / "cells.json")
        return run(of, [learnt()], others(), some, READ, settings, cells, say=said.append)

    first = go(chosen[:1])
    assert said == ["book: locas r2"]
    both = go(chosen)
    assert said == ["book: locas r3"]
    assert both["rows"][0] == first["rows"][0]
    assert go(chosen) == both
    assert said == []
    (tmp_path / "cells.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match=r"cells\.json does not hold results of an evaluation"):
        go(chosen)


def test_a_book_is_not_its_own_unrelated_text(tmp_path: Path) -> None:
    same = Unrelated("the book itself", text(13), 65, "abc")
    result = run(
        backbone(),
        [learnt()],
        [*others(), same],
        configs(backbone(), ["locas"], [2], [1.0], READ),
        READ,
        ForgettingSettings(),
        Cells(tmp_path / "c.json"),
    )
    assert set(result["rows"][0]["unrelated"]) == {"other 0", "other 1"}


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two texts are called other 0"):
        run(backbone(), [learnt()], others() * 2, [], READ, ForgettingSettings(), Cells(tmp_path / "c.json"))


# -------------------------------------------------------------------- texts and configurations


def test_a_book_is_learnt_up_to_what_is_looked_at(tmp_path: Path) -> None:
    of, ids = backbone(), text(97, seed=3)
    document = Document("b.txt", words(ids), "utf-8", "abc")
    settings = ForgettingSettings(later_tokens=23)
    some = book(of, document, 41, settings)
    assert some.stop == 41
    assert some.ids.tolist() == ids[:64].tolist()
    assert book(of, document, None, settings).stop == book(of, document, 1000, settings).stop == 97 - 23
    with pytest.raises(ValueError, match=r"b\.txt has 97 tokens: too few"):
        book(of, document, None, ForgettingSettings(later_tokens=97))


def test_unrelated_text_comes_from_the_middle_in_whole_words() -> None:
    of, ids = backbone(), text(97, seed=3)
    found = unrelated_text(of, Document("b.txt", words(ids), "utf-8", "abc"), ForgettingSettings(unrelated_tokens=13))
    starts = [i for i in range(97 - 13) if ids[i : i + 13].tolist() == found.ids.tolist()]
    assert len(starts) == 1
    assert 44 <= starts[0] <= 53
    assert found.n_bytes == len(words(found.ids).encode())


def test_configurations_multiply_ranks_and_step_sizes() -> None:
    found = configs(backbone(), ["locas", "templora-tuned:rank=5", "dynamic"], [2, 3], [1.0, 0.5], READ)
    assert [c.label for c, _ in found] == [
        "locas r2",
        "locas r2 lr x0.5",
        "locas r3",
        "locas r3 lr x0.5",
        "templora-tuned:rank=5 r5",
        "templora-tuned:rank=5 r5 lr x0.5",
        "dynamic",
        "dynamic lr x0.5",
    ]
    own, half = found[0][1], found[1][1]
    assert half.read.write.lr == own.read.write.lr / 2
    assert own.init is not None
    assert own.init.rank == 2
    lora, slower = found[4][1].recipe, found[5][1].recipe
    assert lora is not None
    assert slower is not None
    assert (lora.rank, slower.lr) == (5, lora.lr / 2)


@pytest.mark.parametrize(
    ("methods", "factors", "says"),
    [
        (["none"], [1.0], "'none' learns nothing"),
        (["truncation"], [1.0], "truncation learns nothing"),
        (["locas+bm25"], [1.0], "learns nothing"),
        (["locas"], [0.0], "a positive multiple"),
        (["locas", "locas"], [1.0], "given twice"),
    ],
)
def test_other_configurations_are_refused(methods: list[str], factors: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        configs(backbone(), methods, [2], factors, READ)


# -------------------------------------------------------------------- cells


def test_cells_are_on_the_disk_at_once_and_their_names_depend_on_everything(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "c.json")
    cells.put("one", {"x": math.nan, "y": [1.5, math.inf]})
    assert Cells(tmp_path / "c.json")["one"] == {"x": None, "y": [1.5, None]}
    assert cells.get("one", lambda: pytest.fail("it is there")) == {"x": None, "y": [1.5, None]}
    assert key_of(a=1, b=2) == key_of(b=2, a=1) != key_of(a=1, b=3)
    assert finite((1, -math.inf)) == [1, None]
    assert Comparison(1, 2.0, 3.0, 4.0).kl == 4.0


# -------------------------------------------------------------------- MMLU's files


def test_fields_with_line_breaks_and_quotes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text(
        'question,choice0,choice1,choice2,choice3,answer\n"Which\nof ""these"", pray?",a,"b, c",d,e,3\n', newline=""
    )
    assert read_csv(path) == [{"question": 'Which\nof "these", pray?', "choices": ["a", "b, c", "d", "e"], "answer": 3}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("question,a,b,c,d,answer\n", "has the columns"),
        ("question,choice0,choice1,choice2,choice3,answer\n", "has no questions"),
        ("question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,4\n", "line 2 of"),
        ("question,choice0,choice1,choice2,choice3,answer\nq,a,b,c\n", "line 2 of"),
        ("question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,1,more\n", "line 2 of"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        read_csv(path)
