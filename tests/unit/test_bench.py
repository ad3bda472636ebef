"""The benchmark: what is timed reads and learns for real; ratios, and what the command prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from locas.backbone import load_backbone
from locas.cli import main
from locas.evaluate import bench
from locas.evaluate.bench import BenchSettings, Timing

SMALL = BenchSettings(rank=5, rounds=2, warmup=1, window=32, chunk=11, generated=2, many=3)


def test_ratios_are_paired_round_by_round() -> None:
    timing = Timing(seconds=[2.0, 9.0, 4.0], reference=[1.0, 3.0, 4.0])
    assert timing.ratios == [2.0, 3.0, 1.0]
    assert timing.ratio == 2.0
    assert timing.quartiles == (1.5, 2.5)


def test_every_method_reads_the_same_chunks_and_those_that_learn_do() -> None:
    backbone = load_backbone()
    ids = torch.arange(5, 5 + 11 * 4)
    for name, begin in bench.methods_of(backbone, SMALL, ids).items():
        step = begin()
        found = [step() for _ in range(3)]
        records = [r[0] if isinstance(r, list) else r for r in found]
        assert [(r.start, r.stop) for r in records] == [(0, 11), (11, 22), (22, 33)], name  # type: ignore[union-attr]
        learns = [r.grad_norm == r.grad_norm for r in records]  # type: ignore[union-attr]
        assert learns == [name != "truncation"] * 3, name


def test_a_shape_has_the_sizes_of_its_model() -> None:
    backbone = bench.random_backbone("qwen3-0.6b", dtype=torch.bfloat16, device="meta", layers=2)
    layer = 1024 * (16 * 128 * 2 + 8 * 128 * 2) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert backbone.n_parameters == 151_936 * 1024 + 2 * layer + 1024
    assert next(backbone.model.parameters()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"no shape 'qwen4'; there are qwen3-0\.6b"):
        bench.random_backbone("qwen4", dtype=torch.float32, device="cpu")


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


def test_tables_and_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rank", "5", "--rounds", "2", "--warmup", "0", "--window", "16", "--chunk", "7"]
    assert main(["bench", "--parts", "documents,rank,reading", "--methods", "locas_exact,locas_reuse", *sizes]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("read + learn, window recomputed", "documents side by side", "at rank", "256"):
        assert part in shown
    assert "TempLoRA" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "speed"], "choose from reading, generating"),
        (["--methods", "lora"], "there is no method lora; there are truncation"),
        (["--backbones", ","], "names none"),
        (["--backbones", "qwen3-4b:0"], "a number of layers"),
        (["--window", "9999"], "use 512 or less"),
    ],
)
def test_wrong_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", *args]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]
