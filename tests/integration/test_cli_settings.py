"""The command line's presets and switches, against what the library makes of the same settings."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import locas
from locas.memory import load
from processes import SMALL, Main

pytestmark = pytest.mark.integration


def test_the_papers_settings(tmp_path: Path, main: Main, tale: Path) -> None:
    output = tmp_path / "m.safetensors"
    assert main("memorize", tale, "-o", output, *SMALL, "--preset", "paper")[0] == 0
    found = load(output).provenance.settings
    assert found["init"]["tau_scale"] == 1.0
    assert (found["read"]["write"]["rule"], found["read"]["write"]["lr"]) == ("adamw", 4e-3)
    assert found["read"]["window"] == 32
    assert found["read"]["attention_gradient"] == "full"
    assert main("memorize", tale, "-o", output, *SMALL, "--preset=paper", "--lr", "0.01")[0] == 0
    found = load(output).provenance.settings
    assert (found["read"]["write"]["rule"], found["read"]["write"]["lr"]) == ("adamw", 0.01)
    assert main("memorize", tale, "-o", output, *SMALL)[0] == 0
    found = load(output).provenance.settings
    assert (found["read"]["write"]["rule"], found["read"]["attention_gradient"]) == ("muon", "values")


def test_the_context_is_kept_unless_told_otherwise_and_both_may_be_said(tmp_path: Path, main: Main, tale: Path) -> None:
    output, small = tmp_path / "m.safetensors", ("--window", "32", "--rank", "3", "--max-tokens", "60")
    cases = {(): True, ("--reuse",): True, ("--no-reuse",): False, ("--preset", "paper"): False}
    cases |= {("--preset", "paper", "--no-reuse"): False, ("--preset", "paper", "--reuse", "--clip"): True}
    for more, kept in cases.items():
        status, out, err = main("memorize", tale, "-o", output, *small, *more, "--json")
        assert status == 0, err
        assert load(output).provenance.settings["read"]["reuse"] == kept, more
        assert (json.loads(out)["nll"] == pytest.approx(_nll(output, tale, 4 if kept else 16))) is True


def _nll(output: Path, tale: Path, chunk: int) -> float:
    """What the library makes of it, told the chunk."""
    backbone, said = locas.load_backbone(), load(output).provenance.settings
    ids, _ = backbone.encode(tale.read_text(), 60)
    write = locas.WriteSettings(**said["read"]["write"])
    memory = locas.create(backbone.model, ids[:chunk], locas.InitSettings(**said["init"]), start_id=backbone.start_id)
    how = {name: said["read"][name] for name in ("reuse", "attention_gradient")}
    settings = locas.ReadSettings(window=32, chunk=chunk, start_in_every_window=False, write=write, **how)
    records = locas.read(backbone.model, memory, ids, settings, start_id=backbone.start_id)
    return float(torch.cat([r.nll for r in records]).double().sum())


FAULTS = """
import resource, sys, torch
from locas.cli import main
main(["info", "no-such-file"])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(1 << 20) for _ in range(16)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(6)), file=sys.stderr)  # the first ones fill the heap
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment: dict[str, str], kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    faults = int(done.stderr.splitlines()[-1])
    assert faults < 5000 if kept else faults > 10_000  # 64 MiB in pages of 4 KiB: 16,384
