"""Files: what is written comes back bit for bit, and nothing else ever comes out of a file."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import tiny_model
from helpers import memory_for, same_bytes, snapshot
from locas.memory import Memory, Provenance, load
from locas.sites import fingerprint
from locas.store import load_tensors, save_tensors
from memory_files import contents, small_memory

# -------------------------------------------------------------------- round trip


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2, 7).T, "c": torch.tensor(11), "empty": torch.zeros(0, 3)}
    manifest = {"format": "kind", "nested": {"π": [1, 2.5, None, True, "\udcff"]}, "numbers": {10: 1, 9: 2}}
    save_tensors(tmp_path / "f.safetensors", tensors, manifest)
    found, said = load_tensors(tmp_path / "f.safetensors", kind="kind")
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[name], tensor.contiguous()) for name, tensor in tensors.items())
    assert said == {"format": "kind", "nested": {"π": [1, 2.5, None, True, "\udcff"]}, "numbers": {"10": 1, "9": 2}}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=11,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_manifest_comes_back(real: tuple[Path, bytes], anything: Any) -> None:
    path = real[0].with_name("any.safetensors")
    save_tensors(path, {"x": torch.ones(1)}, {"format": "kind", "anything": anything})
    assert load_tensors(path, kind="kind")[1] == {"format": "kind", "anything": anything}


def test_nan_survives_where_it_has_a_meaning_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_tensors(path, {"losses.0": torch.tensor([1.0, torch.nan])}, {"format": "kind"})
    assert load_tensors(path, kind="kind", may_be_nan=("losses.",))[0]["losses.0"].isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in 'losses\.0'.*Nothing was loaded"):
        load_tensors(path, kind="kind")
    with pytest.raises(ValueError, match="NaN"):
        save_tensors(path, {}, {"format": "kind", "x": float("nan")})
    assert "losses.0" in load_tensors(path, kind="kind", may_be_nan=("losses.",))[0]


def test_equal_contents_give_equal_bytes_in_any_process(tmp_path: Path, real: tuple[Path, bytes]) -> None:
    small_memory().save(tmp_path / "here.safetensors")
    assert (tmp_path / "here.safetensors").read_bytes() == real[1]
    code = "import sys, locas; locas.load(sys.argv[1]).save(sys.argv[2])"
    names = [str(tmp_path / "here.safetensors"), str(tmp_path / "there.safetensors")]
    subprocess.run([sys.executable, "-c", code, *names], check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (tmp_path / "there.safetensors").read_bytes() == real[1]


def test_the_order_of_tensors_and_keys_does_not_show(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}
    manifest = {"format": "kind", "x": 1, "y": {"p": 1, "q": 2}}
    save_tensors(tmp_path / "1", tensors, manifest)
    turned = {"y": {"q": 2, "p": 1}, "x": 1, "format": "kind"}
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), turned)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


# -------------------------------------------------------------------- damage


def loads_the_same_or_refuses(path: Path, damaged: bytes) -> bool:
    """Whether the damaged file was refused; fails if anything but the original came out of it."""
    path.write_bytes(damaged)
    try:
        memory = load(path)
    except ValueError as error:
        said = str(error)
        return ("m.safetensors" in said and "Nothing was loaded" in said) or pytest.fail(said)
    manifest, rows, tau = contents(memory)
    expected_manifest, expected_rows, expected_tau = contents(small_memory())
    assert manifest == expected_manifest
    assert same_bytes(rows, expected_rows)
    assert same_bytes(tau, expected_tau)
    return False


def test_every_byte_counts(real: tuple[Path, bytes]) -> None:
    path, raw = real
    refused = 0
    for i in range(len(raw)):
        refused += loads_the_same_or_refuses(path, raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
    assert refused > len(raw) - 16  # all but some that pad the header


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_byte(real: tuple[Path, bytes], data: st.DataObject) -> None:
    path, raw = real
    i = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255))
    loads_the_same_or_refuses(path, raw[:i] + bytes([byte]) + raw[i + 1 :])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_truncation(real: tuple[Path, bytes], data: st.DataObject) -> None:
    path, raw = real
    assert loads_the_same_or_refuses(path, raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_garbage_before_after_or_in_place_of_the_file(real: tuple[Path, bytes], data: st.DataObject) -> None:
    path, raw = real
    garbage = data.draw(st.binary(min_size=1, max_size=40))
    where = data.draw(st.sampled_from(["before", "after", "in place", "over the beginning"]))
    damaged = {
        "before": garbage + raw,
        "after": raw + garbage,
        "in place": garbage,
        "over the beginning": garbage + raw[len(garbage) :],
    }[where]
    if damaged != raw:
        assert loads_the_same_or_refuses(path, damaged) or where == "over the beginning"


def test_a_refused_file_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    provenance = Provenance("tiny", fingerprint(model))
    path = tmp_path / "m.safetensors"
    Memory(memory_for(model), provenance).save(path)
    before, raw = snapshot(model), path.read_bytes()
    assert load(path, model).bank.layers == (0, 1, 2)
    for i in range(0, len(raw), 211):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 0x40]) + raw[i + 1 :])
        with pytest.raises(ValueError, match="Nothing was loaded"):
            load(path, model)
    assert all(same_bytes(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_loaded_does_not_hang_on_the_file(real: tuple[Path, bytes]) -> None:
    path, raw = real
    path.write_bytes(raw)
    memory = load(path)
    before = copy.deepcopy(contents(memory))
    path.write_bytes(b"\xff" * len(raw))
    manifest, rows, tau = contents(memory)
    assert manifest == before[0]
    assert same_bytes(rows, before[1])
    assert same_bytes(tau, before[2])
