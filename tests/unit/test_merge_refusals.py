"""What cannot be merged is refused with the reason, and nothing is left half done."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import locas.checkpoint
import locas.merge
from checkpoints import UNEQUAL, SavedOf, came_back, files_of, keep, stock, tensors_of
from families import MOE, tiny_model
from helpers import fill, logits_of, memory_for, text
from locas.attach import attached
from locas.bank import Bank
from locas.merge import MANIFEST, merge
from locas.sites import FAMILIES, Family, find_family, find_sites
from locas.unmerge import unmerge

# -------------------------------------------------------------------- refusals


def refuses(error: type[Exception], pattern: str, folder: Path, *args: Any, **options: Any) -> None:
    """Merging fails with this message and leaves the folder as it was."""
    before = files_of(folder), sorted(folder.iterdir())
    with pytest.raises(error, match=pattern):
        merge(*args, **options)
    assert (files_of(folder), sorted(folder.iterdir())) == before


@pytest.mark.parametrize(
    ("name", "reason"), [("bloom", "no setting for the FFN's width"), *((name, "mixture of experts") for name in MOE)]
)
def test_families_that_cannot_be_widened(saved_of: SavedOf, tmp_path: Path, name: str, reason: str) -> None:
    model, source = saved_of(name)
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    refuses(ValueError, rf"{reason}.*--memory FILE", tmp_path, [file], tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "variant", "activation", "reason"),
    [
        ("llama", "mlp", "silu", "Locas-MLP memory, but this backbone's FFN has a gate: .*--variant glu"),
        ("opt", "glu", "relu", "Locas-GLU memory, but this backbone's FFN has no gate: .*--variant mlp"),
        ("gpt2", "mlp", "relu", "is relu, but the backbone's FFN has gelu_new.*--activation auto"),
    ],
)
def test_memories_that_an_ffn_cannot_express(
    saved_of: SavedOf, tmp_path: Path, name: str, variant: Any, activation: str, reason: str
) -> None:
    model, source = saved_of(name)
    width = find_sites(model)[0].d_model
    file = keep(fill(Bank(variant, activation, width, {1: 3})), model, tmp_path / "m.safetensors", source)
    refuses(ValueError, reason, tmp_path, [file], tmp_path / "merged")


def test_the_wrong_backbone(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    good = keep(memory_for(model), model, tmp_path / "good.safetensors", source)
    other = keep(memory_for(model), tiny_model("llama", seed=1), tmp_path / "other.safetensors", source)
    args = [good, other], tmp_path / "merged"
    refuses(ValueError, r"other\.safetensors was made with the backbone .* are others .*--model", tmp_path, *args)
    wide = keep(fill(Bank("glu", "silu", 23, {0: 1})), model, tmp_path / "wide.safetensors", source)
    refuses(ValueError, "width 23 .* has width 22", tmp_path, [wide], tmp_path / "merged")
    deep = keep(fill(Bank("glu", "silu", 22, {7: 1})), model, tmp_path / "deep.safetensors", source)
    refuses(ValueError, r"layers \[7\].*layers 0\.\.2", tmp_path, [deep], tmp_path / "merged")


def test_wrong_arguments(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    output = tmp_path / "merged"
    refuses(ValueError, "no memory to merge", tmp_path, [], output)
    refuses(ValueError, "align must be 1 or more; got 0", tmp_path, [file], output, align=0)
    refuses(ValueError, "'float8' is not one of stored, float32, float64", tmp_path, [file], output, dtype="float8")
    refuses(ValueError, "stored as F64, and --dtype may only widen", tmp_path, [file], output, dtype="float32")
    refuses(FileNotFoundError, "there is no file", tmp_path, [tmp_path / "none.safetensors"], output)
    refuses(FileNotFoundError, "folder .* does not exist", tmp_path, [file], tmp_path / "no" / "merged")
    refuses(ValueError, "inside the checkpoint", tmp_path, [file], source / "merged")
    refuses(ValueError, r"'no/such model' was not found.*--model", tmp_path, [file], output, model="no/such model")
    refuses(FileExistsError, "exists already", tmp_path, [file], file)
    output.mkdir()
    (output / "thesis.tex").write_text("the only copy")
    refuses(FileExistsError, "exists already", tmp_path, [file], output)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ("quantised", ValueError, "is quantised.*--memory FILE"),
        ("fp8", ValueError, "stored as F8_E4M3: a quantised FFN"),
        ("adapter", ValueError, "adapter"),
        ("bin", FileNotFoundError, "no safetensors weights.*save_pretrained"),
        ("no config", FileNotFoundError, "no config.json"),
        ("cut", ValueError, "cut short"),
        ("lacks one", ValueError, "should hold .*up_proj.* no such tensor"),
        ("shape", ValueError, r"should hold .*\(37, 22\), and holds \(36, 22\)"),
        ("twice", ValueError, "two tensors for one FFN matrix"),
        ("type", ValueError, "transformers makes no causal language model"),
    ],
)
def test_checkpoints_that_do_not_fit(
    saved_of: SavedOf, tmp_path: Path, change: str, error: type[Exception], reason: str
) -> None:
    model, good = saved_of("llama")
    source = tmp_path / "source"
    shutil.copytree(good, source)
    weights, config, name = source / "model.safetensors", source / "config.json", "model.layers.1.mlp.up_proj.weight"
    settings, tensors = json.loads(config.read_text()), tensors_of(source)
    if change == "quantised":
        config.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    elif change == "adapter":
        (source / "adapter_config.json").write_text("{}")
    elif change == "bin":
        weights.unlink()
    elif change == "no config":
        config.unlink()
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif change == "type":
        config.write_text(json.dumps(settings | {"model_type": "no such"}))
    else:
        if change == "lacks one":
            del tensors[name]
        elif change == "shape":
            tensors[name] = tensors[name][:36].clone()
        elif change == "twice":
            tensors[f"vision.{name}"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, weights, {"format": "pt"})
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    refuses(error, reason, tmp_path, [file], tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "reason"),
    [("hidden_size", "also sets the size of|is not the width"), ("head_dim", "is not the width of this family's FFN")],
)
def test_a_family_described_with_the_wrong_key(
    saved_of: SavedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, reason: str
) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    family = find_family(model)
    wrong = Family(("llama",), family.layers, "mlp", "mlp", family.up, family.down, family.gate, width=key)
    monkeypatch.setattr("locas.sites.FAMILIES", [*FAMILIES, wrong])
    refuses(ValueError, reason, tmp_path, [file], tmp_path / "merged")


def test_numbers_too_large_for_the_checkpoint(saved_of: SavedOf, tmp_path: Path) -> None:
    _, source = saved_of("llama", torch.float16)
    model = stock(source)
    bank = memory_for(model, layers=UNEQUAL)
    bank.tau.fill_(1e6)
    file = keep(bank, model, tmp_path / "m.safetensors", source)
    refuses(ValueError, "too large for F16.*--dtype float32", tmp_path, [file], tmp_path / "merged")
    merge([file], tmp_path / "merged", dtype="float32")


def test_a_merged_checkpoint_is_not_merged_again(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    first = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    merge([first], tmp_path / "merged")
    merged = stock(tmp_path / "merged")
    bank = memory_for(merged, layers=UNEQUAL, seed=1)
    second = keep(bank, merged, tmp_path / "n.safetensors", tmp_path / "merged")
    refuses(ValueError, "merged checkpoint already", tmp_path, [second], tmp_path / "twice")
    (tmp_path / "merged" / MANIFEST).unlink()
    merge([second], tmp_path / "twice")
    ids = text(13)[None]
    with attached(merged, bank):
        wanted = logits_of(merged, ids)
    torch.testing.assert_close(logits_of(stock(tmp_path / "twice"), ids), wanted, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------- nothing half done


def test_an_error_on_the_way_leaves_nothing(saved_of: SavedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([file], tmp_path / "merged", on_progress=stop)
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 7))  # type: ignore[attr-defined]
    refuses(
        OSError, r"would take .* GiB, and .* has 0\.00 GiB free.*Nothing was written", tmp_path, [file], tmp_path / "m"
    )


def test_the_rest_of_a_killed_run_is_replaced(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    stale = tmp_path / ".merged.partial"
    (stale / "sub").mkdir(parents=True)
    (stale / "sub" / "old").write_text("half")
    (stale / "model.safetensors").write_text("half")
    (tmp_path / "merged").mkdir()  # an empty folder may be there already
    merge([file], tmp_path / "merged")
    assert not stale.exists()
    unmerge(tmp_path / "merged", tmp_path / "back")
    came_back(source, tmp_path / "back", [file])


def test_folders_that_cannot_be_locked_are_written_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")

    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says of a folder that is open for reading")

    monkeypatch.setattr(fcntl, "flock", refused)
    with locas.checkpoint.new_folder(tmp_path / "merged") as folder:
        (folder / "mine").write_text("safe")
    assert (tmp_path / "merged" / "mine").read_text() == "safe"


def test_two_runs_do_not_write_one_folder(saved_of: SavedOf, tmp_path: Path) -> None:
    model, source = saved_of("llama")
    file = keep(memory_for(model), model, tmp_path / "m.safetensors", source)
    with locas.checkpoint.new_folder(tmp_path / "merged") as folder:
        (folder / "mine").write_text("safe")
        with pytest.raises(OSError, match="another process is writing"):
            merge([file], tmp_path / "merged")
    assert (tmp_path / "merged" / "mine").read_text() == "safe"
