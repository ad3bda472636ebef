"""Merging with real files: without locas on the other side, killed half-way, from the hub's cache, large ones."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import locas
from families import tiny_model
from helpers import memory_for, text
from locas.attach import attached
from locas.checkpoint import find_checkpoint
from locas.cli import main
from locas.memory import Memory, Provenance
from locas.merge import MEMORIES, merge
from locas.sites import fingerprint
from locas.unmerge import unmerge

pytestmark = pytest.mark.integration

WITHOUT_LOCAS = """
import sys
sys.modules["locas"] = None  # any import of it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = load_file(folder + ".wanted")
    with torch.no_grad():
        logits = model(wanted["ids"]).logits
    torch.testing.assert_close(logits, wanted["logits"], rtol=1e-12, atol=1e-12)
assert not any(name.startswith("locas") and module for name, module in sys.modules.items())
print("equal")
"""

TWICE = """
import contextlib, io, json, sys
from locas.cli import main
for name in ("org/tiny", "org/other"):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = main([*sys.argv[1:], "--model", name])
    print(json.dumps([status, shown.getvalue()]))
"""

SLOWLY = """
import sys, time
from locas.merge import merge
def wait(done, total):
    print(done, flush=True)
    time.sleep(0.5)
merge([sys.argv[1]], sys.argv[2], on_progress=wait)
"""

PEAK = """
import gc, json, sys
from locas.merge import merge
from locas.merge_plan import skeleton
from locas.unmerge import unmerge
from locas.checkpoint import open_checkpoint
def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
skeleton(open_checkpoint(sys.argv[2]).config)  # what any model of this kind takes, and its imports
gc.collect()
before = resident("VmRSS")
merge([sys.argv[1]], sys.argv[3])
unmerge(sys.argv[3], sys.argv[4])
print(resident("VmHWM") - before)
"""


def python(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(arg) for arg in args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tiny(name: str, folder: Path) -> Path:
    """A saved tiny model, with a memory file beside its folder."""
    tiny_model(name).save_pretrained(folder, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    bank = memory_for(model, layers={0: 3, 2: 5})
    Memory(bank, Provenance(str(folder), fingerprint(model))).save(folder.with_suffix(".safetensors"))
    with attached(model, bank), torch.no_grad():
        ids = text(13)[None]
        save_file({"ids": ids, "logits": model(ids).logits}, folder.with_suffix(".wanted"))
    return folder


def test_stock_transformers_computes_what_was_attached(tmp_path: Path) -> None:
    merged = []
    for name in ("qwen3", "phi3", "gpt2", "opt", "falcon"):
        source = tiny(name, tmp_path / name)
        merged.append(tmp_path / f"{name}-merged")
        merge([source.with_suffix(".safetensors")], merged[-1])
        source.with_suffix(".wanted").rename(tmp_path / f"{name}-merged.wanted")
    result = python("-W", "error", "-c", WITHOUT_LOCAS, *merged)
    assert result.stdout == "equal\n", result.stderr


def test_a_kill_leaves_no_checkpoint_under_the_final_name(tmp_path: Path) -> None:
    source, output = tiny("llama", tmp_path / "llama"), tmp_path / "merged"
    memory, before = source.with_suffix(".safetensors"), files_of(source)
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, memory, output], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        for _ in range(3):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not output.exists()
    assert list((tmp_path / ".merged.partial").glob("*.safetensors"))
    assert files_of(source) == before
    merge([memory], output)
    assert not (tmp_path / ".merged.partial").exists()
    unmerge(output, tmp_path / "back")
    assert files_of(tmp_path / "back") == before | {f"{MEMORIES}/llama.safetensors": files_of(tmp_path)[memory.name]}


def test_a_name_on_the_hub(tmp_path: Path) -> None:
    """From huggingface_hub's cache, as a download leaves it: links to blobs, and weights that are not ours to take."""
    source = tiny("qwen2", tmp_path / "qwen2")
    repository = tmp_path / "home" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        (repository / "blobs" / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    memory, output = source.with_suffix(".safetensors"), tmp_path / "merged"
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = python("-W", "error", "-c", TWICE, "merge", memory, "-o", output, "--json", **offline)
    assert result.returncode == 0, result.stderr
    (status, merged), (other_status, other) = map(json.loads, result.stdout.splitlines())
    assert (status, other_status) == (0, 2)
    assert json.loads(merged)["backbone"] == "org/tiny"
    assert "'org/other' was not found" in json.loads(other)["error"]
    assert not any(path.is_symlink() for path in output.rglob("*"))
    unmerge(output, tmp_path / "back")
    assert files_of(source).items() <= files_of(tmp_path / "back").items()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_stays_at_about_one_shard(tmp_path: Path) -> None:
    """A checkpoint of 320 MB in shards of 40. One tensor of 8 MB is changed at a time; glibc keeps about 100 MB of what
    was freed, however large the checkpoint is."""
    shape: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 97}
    config = AutoConfig.for_model("llama", **shape, intermediate_size=4096, num_hidden_layers=12)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source", max_shard_size="40MB")
    total = sum(p.numel() * 4 for p in model.parameters())
    memory = Memory(memory_for(model, layers={3: 7}), Provenance(str(tmp_path / "source"), fingerprint(model)))
    memory.save(tmp_path / "m.safetensors")
    del model
    folders = [tmp_path / name for name in ("m.safetensors", "source", "merged", "back")]
    result = python("-c", PEAK, *folders)
    assert result.returncode == 0, result.stderr
    assert total > 300e6
    assert int(result.stdout) < total / 2
    before = files_of(tmp_path / "source")
    assert before.items() <= files_of(tmp_path / "back").items()


def test_built_in_backbone_from_text_to_checkpoint_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Path(__file__).read_text()
    (tmp_path / "book.txt").write_text(book)
    memory, merged, back = tmp_path / "book.safetensors", tmp_path / "merged", tmp_path / "back"
    read = ["memorize", str(tmp_path / "book.txt"), "-o", str(memory), "--rank", "16", "--max-tokens", "512", "--json"]
    assert main(read) == 0
    assert main(["merge", str(memory), "-o", str(merged), "--dtype", "float32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["width"]["original"], result["width"]["merged"]) == (512, 768)
    backbone, alone = locas.load_backbone(), locas.load_backbone(str(merged))
    ids, _ = backbone.encode(book, 200)
    with torch.no_grad():
        plain = backbone.model(ids[None]).logits
        with locas.load(memory, backbone.model).attached(backbone.model):
            wanted = backbone.model(ids[None]).logits
        found = alone.model(ids[None]).logits
    assert alone.tokenizer_sha256 == backbone.tokenizer_sha256
    # float32: sums over 768 slots in another order, through six layers.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - plain).abs().max() > 0.1
    assert main(["unmerge", str(merged), "-o", str(back)]) == 0
    original = find_checkpoint("tiny-glu")
    digest = hashlib.sha256(memory.read_bytes()).hexdigest()
    assert files_of(back) == files_of(original) | {f"{MEMORIES}/book.safetensors": digest}
