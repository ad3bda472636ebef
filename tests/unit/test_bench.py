"""The benchmark: what is timed reads and learns for real; ratios, and what the command prints and writes."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from locas.backbone import load_backbone
from locas.cli import main
from locas.evaluate import bench, bench_scaling, provenance, shapes
from locas.evaluate.bench import BenchSettings, Timing
from locas.write import WriteSettings

SMALL = BenchSettings(rank=5, rounds=2, warmup=1, window=32, chunk=12, generated=2, many=3)


def test_ratios_are_paired_round_by_round() -> None:
    timing = Timing(seconds=[2.0, 9.0, 4.0], reference=[1.0, 3.0, 4.0])
    assert timing.ratios == [2.0, 3.0, 1.0]
    assert timing.ratio == 2.0
    assert timing.quartiles == (1.5, 2.5)


def test_every_method_reads_the_same_chunks_and_those_that_learn_do() -> None:
    backbone = load_backbone()
    ids = torch.arange(5, 5 + 12 * 4)
    for name, begin in bench.methods_of(backbone, SMALL, ids).items():
        step = begin()
        found = [step() for _ in range(3)]
        records = [r if isinstance(r, list) else [r] for r in found]
        # Memories, and what they are compared with, are read and written far into a text.
        begins = 0 if name == "templora" else 2 * WriteSettings().damping_every * 12
        spans = [(r[0].start - begins, r[-1].stop - begins) for r in records]  # type: ignore[union-attr]
        assert spans == [(0, 12), (12, 24), (24, 36)], name
        assert [len(r) for r in records] == [4 if name == "locas_reuse_short" else 1] * 3, name
        learns = [not math.isnan(r.grad_norm) for several in records for r in several]  # type: ignore[union-attr]
        assert learns == [name != "truncation"] * len(learns), name


@pytest.mark.parametrize(("name", "billions"), [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022)])
def test_a_shape_has_the_sizes_of_its_model(name: str, billions: float) -> None:
    """The hub's own counts of parameters."""
    backbone = shapes.random_backbone(name, dtype=torch.bfloat16, device="meta")
    assert backbone.n_parameters == shapes.SHAPES[name].n_parameters()
    assert backbone.n_parameters / 1e9 == pytest.approx(billions, abs=0.0005)
    assert next(backbone.model.parameters()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_some_layers_of_a_shape() -> None:
    backbone = shapes.random_backbone("qwen3-0.6b", dtype=torch.float32, device="meta", layers=2)
    layer = 1024 * (16 * 128 * 2 + 8 * 128 * 2) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert backbone.n_parameters == 151_936 * 1024 + 2 * layer + 1024 == shapes.SHAPES["qwen3-0.6b"].n_parameters(2)
    assert backbone.name == "qwen3-0.6b:2"
    with pytest.raises(ValueError, match=r"no shape 'qwen4'; there are qwen3-0\.6b"):
        shapes.random_backbone("qwen4", dtype=torch.float32, device="cpu")


def test_what_learning_keeps_is_estimated_about_right() -> None:
    """Against what a chunk of the built-in backbone, which is of the same family, really takes at its peak."""
    config = load_backbone().model.config
    shape = shapes.Shape(
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
    )
    backbone = load_backbone()
    assert shape.n_parameters() == backbone.n_parameters
    found = bench.peaks(backbone, BenchSettings(rank=5, window=256, chunk=128), ["locas_exact_full"])[
        "locas_exact_full"
    ]
    estimate = 4 * (shape.n_parameters() + shape.learning_numbers(256, 128))
    assert 0.7 < found / estimate < 1.4


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    free = shapes.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert shapes.free_bytes(torch.device("meta")) is None
    sizes = {"dtype": torch.float32, "device": "cpu", "window": 2048, "chunk": 1024}
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 10 * 2**30)
    shapes.check_room("qwen3-0.6b", **sizes)
    with pytest.raises(
        ValueError, match=r"learn 2,048 tokens at once\), .*a shorter --window, --methods without templora"
    ):
        shapes.check_room("qwen3-0.6b", **sizes, templora=True)
    message = (
        r"qwen3-4b in float32 takes about [\d.]+ GiB \(15\.0 for its weights, the rest to learn 1,024 tokens "
        r"at once\), and cpu has 10\.0 GiB free; use --dtype bfloat16, a shorter --window, or only some of its layers "
        r"\(qwen3-4b:9\)"
    )
    with pytest.raises(ValueError, match=message):
        shapes.check_room("qwen3-4b", **sizes)
    shapes.check_room("qwen3-4b", **sizes, layers=9)
    monkeypatch.setattr(shapes, "free_bytes", lambda device: None)
    shapes.check_room("qwen3-4b", **sizes)


def test_readers_begin_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[int, bool] = {}

    def note(work: dict[str, Callable[[], object]], *more: object) -> dict[str, Timing]:
        for name, step in work.items():
            (record,) = step()  # type: ignore[misc]
            assert record.start == int(name)
            assert record.grad_norm > 0
            started[record.start] = step.__self__.reuses  # type: ignore[attr-defined]
        return {}

    monkeypatch.setattr(bench_scaling, "side_by_side", note)
    for reuse in (False, True):
        bench_scaling.over_lengths(load_backbone(), SMALL, (100, 10_007), reuse)
        assert started == {100: reuse, 10_007: reuse}


def test_the_command_prints_one_json_line_and_writes_file_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rank", "5", "--rounds", "2", "--warmup", "1", "--window", "32", "--chunk", "11", "--generated", "2"]
    assert main(["bench", "--quick", "--json", "-o", str(tmp_path), "--many", "3", *sizes]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert {"truncation", "locas_exact", "locas_reuse", "templora"} <= set(result["relative_time"])
    assert result["relative_time"]["truncation"] == 1.0
    assert all(ratio > 0 for ratio in result["relative_time"].values())
    assert result["relative_memory"]["locas_exact"] > result["relative_memory"]["truncation"] == 1.0
    assert {"commit", "seeds", "versions", "settings", "device"} <= set(result)
    assert (result["settings"]["window"], result["settings"]["chunk"], result["settings"]["rank"]) == (32, 11, 5)


def test_tables_and_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rank", "5", "--rounds", "2", "--warmup", "0", "--window", "16", "--chunk", "7", "--generated", "1"]
    parts = "documents,rank,window,memories,memory"
    assert main(["bench", "--parts", parts, "--methods", "locas_exact,locas_reuse", "-o", str(tmp_path), *sizes]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("read + learn, window recomputed", "peak MiB", "documents side by side", "at this rank", "256"):
        assert part in shown
    assert "TempLoRA" not in shown
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [*result["window"]] == ["4", "8", "16"]
    assert [*result["memories"]] == ["1", "4", "16"]
    its = result["documents"]["16"]
    assert its["throughput"] == pytest.approx(16 / its["ratio"])
    assert result["peak_bytes"]["locas_exact"] > result["peak_bytes"]["truncation"] > 4 * 4_230_336
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_several_backbones_and_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shape that is small in everything but its name."""
    monkeypatch.setitem(shapes.SHAPES, "qwen3-0.6b", shapes.Shape(32, 24, 3, heads=4, kv_heads=2, head_dim=8, vocab=31))
    sizes = ["--rank", "5", "--rounds", "2", "--warmup", "0", "--window", "16", "--chunk", "7"]
    more = ["--parts", "reading", "--methods", "locas_exact", "--profile", "locas_exact", "--dtype", "bfloat16"]
    command = ["bench", "--backbones", "qwen3-0.6b,qwen3-0.6b:2", "--device", "cpu,cpu", "-o", str(tmp_path), *more]
    assert main([*command, "--json", *sizes]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [run["backbone"]["name"] for run in result["runs"]] == ["qwen3-0.6b", "qwen3-0.6b:2"] * 2
    assert {run["backbone"]["dtype"] for run in result["runs"]} == {"bfloat16"}
    assert {key: result[key] for key in result["runs"][0]} == result["runs"][0]
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    trace = json.loads((tmp_path / "profile-qwen3-0.6b-2-cpu-locas_exact.json").read_text())
    assert any("flash_attention" in event.get("name", "") for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "speed"], "choose from reading, generating"),
        (["--methods", "lora"], "there is no method lora; there are truncation"),
        (["--parts", "memory", "--methods", "lora"], "there is no method lora; there are truncation"),
        (["--backbones", ","], "names none"),
        (["--backbones", "qwen3-4b:0"], "a number of layers"),
        (["--backbones", "builtin,qwen3-4b:99999"], "takes about"),
        (["--device", ","], "--device names none"),
        (["--device", "cpu,tpu"], "no TPU device here"),
        (["--device", "cuda:99"], "no CUDA:99 device here"),
        (["--profile", "lora"], "choose from truncation, locas_exact"),
        (["--window", "9999"], "use 2048 or less"),
    ],
)
def test_wrong_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", *args]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512_bf16\n\nmodel name\t: AMD EPYC\n", "AMD EPYC (avx512_bf16)"),
        ("model name : Xeon, old\nflags : amx_bf16 avx512_bf16\n", "Xeon  old (amx_bf16)"),
        ("processor : 0\nFeatures : asimd bf16 i8mm\n", f"{platform.machine()} (bf16)"),
        ("processor : 0\n", platform.machine()),
    ],
)
def test_a_processor_is_named_with_what_multiplies_bfloat16(tmp_path: Path, cpuinfo: str, expected: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert provenance._processor(path) == expected
    assert provenance._processor(tmp_path / "absent") == platform.machine()
