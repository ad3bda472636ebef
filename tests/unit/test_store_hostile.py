"""Files that somebody made up: each is refused with the reason, and none is executed."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

import locas.store
from locas.memory import FORMAT, FORMAT_VERSION, load
from memory_files import forge, raw_file, small_memory


def test_a_missing_path_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.safetensors; check the path"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"is a folder; a locas-memory is one \.safetensors file"):
        load(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="not a file"):
        load(tmp_path / "m.safetensors")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    for name, data in (("pickle", pickle.dumps(Touch())), ("long", pickle.dumps([Touch(), "x" * 1000]))):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            load(path)
    torch.save({"x": torch.ones(3)}, tmp_path / "torch.safetensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load(tmp_path / "torch.safetensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        raw_file(b"[" * 100_000),
        raw_file(b'{"a":' * 1000),
        raw_file(b"\xff" * 64),
        raw_file({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
        raw_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}, b"\0" * 8),
        raw_file({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        raw_file({"x": {"dtype": "object", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.safetensors is .*Nothing was loaded"):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not one of ours: its metadata has no 'locas' entry"),
        ({}, "not one of ours"),
        ({"other": "{}"}, "not one of ours"),
        ({"locas": ""}, "is not JSON"),
        ({"locas": "{"}, "is not JSON"),
        ({"locas": '{"format": ' + "9" * 5000 + "}"}, "is not JSON"),
        ({"locas": "[" * 100_000}, "is not JSON"),
        ({"locas": "null"}, "is not a locas-memory: its manifest says None"),
        ({"locas": "[1]"}, "is not a locas-memory"),
        ({"locas": '{"format": ["locas-memory"]}'}, r"its manifest says \['locas-memory'\]"),
        ({"locas": '{"format": "locas-run"}'}, "its manifest says 'locas-run'"),
        ({"locas": '{"format": "locas-memory", "x": ' + "[" * 500 + "]" * 500 + "}"}, "nested"),
        ({"locas": '{"format": "locas-memory"}'}, "checksum"),
        ({"locas": '{"format": "locas-memory", "sha256": ["x"]}'}, "checksum"),
        ({"locas": '{"format": "locas-memory", "x": NaN, "sha256": "0"}'}, "checksum|not JSON"),
    ],
)
def test_hostile_metadata(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"x": torch.ones(3)}, metadata=metadata))
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was loaded"):
        load(path)


def test_an_enormous_manifest_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = forge(tmp_path / "m.safetensors", lambda manifest, _: manifest.update(settings={"x": "y" * 1000}))
    monkeypatch.setattr(locas.store, "_MAX_MANIFEST_BYTES", 999)
    with pytest.raises(ValueError, match=r"the manifest of .* has \d+ characters, which none of ours has"):
        load(path)


DEEP: Any = 1

for _ in range(300):
    DEEP = [DEEP]

WRONG: list[Any] = [None, [], {}, "x", "", -1, 0, 1.5, 10**30, 10**400, True, [[]], {"0": []}, {"0": -1}, {"0": 10**12}]

WRONG += [{"x": 1}, {"0": None, "3": None}, {"0": "nan", "3": 1.0}, {"0": 1e39, "3": 1.0}, {"0": 10**400, "3": 1}, DEEP]

WRONG += [{"0": 2, "00": 2, "3": 7}, {" 0": 2, "3": 7}, [["0", 2], ["3", 7]], [{}], [{"name": 1}], "x" * 5000]

# A text that says something false about itself is not damage: what fits its key is taken.
FITS = {
    "backbone": (str,),
    "backbone_fingerprint": (str,),
    "tokenizer_sha256": (str, type(None)),
    "library": (str,),
    "settings": (dict,),
}

KEYS = sorted(small_memory().manifest())


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_at_any_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.safetensors"
    for value in WRONG:
        if isinstance(value, FITS.get(key, ())) or (key, value) == ("documents", []):
            continue

        def put(manifest: dict[str, Any], _: object, value: Any = value) -> None:
            manifest[key] = value

        forge(path, put)
        with pytest.raises(ValueError, match=r"(?s)m\.safetensors.*Nothing was loaded"):
            load(path)
    if key != "format":
        forge(path, lambda manifest, _: manifest.pop(key))
        with pytest.raises(ValueError, match=f"'{key}' is missing|version None|format None"):
            load(path)


@pytest.mark.parametrize("key", ["name", "tokens", "ids_sha256", "text_sha256", "more"])
def test_a_wrong_type_in_a_document(tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.safetensors"
    for value in ([], {}, -1, 1.5, 10**400, True, DEEP[0]):

        def put(manifest: dict[str, Any], _: object, value: Any = value) -> None:
            manifest["documents"][1][key] = value

        if (key, value) == ("tokens", 10**400):
            continue  # more than fits, but a number of tokens
        forge(path, put)
        with pytest.raises(ValueError, match=r"(?s)m\.safetensors.*Nothing was loaded"):
            load(path)


def test_what_fits_its_key_is_taken_and_can_be_described(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for key, value in (("settings", {"a": [{"b": None}]}), ("backbone", "x" * 5000), ("documents", [])):
        forge(path, lambda manifest, _, key=key, value=value: manifest.update({key: value}))
        assert load(path).manifest()[key] == (value if key != "documents" else ())


def with_nan(tensors: dict[str, Tensor], value: float) -> None:
    tensors["layers.3.value"] = tensors["layers.3.value"].clone()
    tensors["layers.3.value"][6, 4] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.gate"), r"'layers\.0\.gate' should be \(2, 5\) and is None"),
        (lambda t: t.update(extra=torch.ones(1)), r"'extra' should be None and is \(1,\)"),
        (
            lambda t: t.update({"layers.3.key": torch.ones(5, 7)}),
            r"'layers\.3\.key' should be \(7, 5\) and is \(5, 7\)",
        ),
        (lambda t: t.update({"layers.3.key": torch.ones(35)}), r"'layers\.3\.key' should be"),
        (lambda t: t.update({"layers.3.key": torch.tensor(1.0)}), r"'layers\.3\.key' should be"),
        (lambda t: t.clear(), "should be"),
        (lambda t: t.update({k: x.half() for k, x in t.items()}), "dtype float16; a memory is float32"),
        (lambda t: t.update({k: x.bfloat16() for k, x in t.items()}), "dtype bfloat16"),
        (lambda t: t.update({k: x.int() for k, x in t.items()}), "dtype int32"),
        (lambda t: t.update({k: x.bool() for k, x in t.items()}), "dtype bool"),
        (lambda t: t.update({k: x.to(torch.complex64) for k, x in t.items()}), "dtype complex64"),
        (lambda t: t.update({k: x.to(torch.float8_e4m3fn) for k, x in t.items()}), "float8_e4m3fn"),
        (lambda t: t.update({"layers.0.key": t["layers.0.key"].double()}), "dtype float32, float64"),
        (lambda t: with_nan(t, torch.nan), r"NaN or infinite numbers in 'layers\.3\.value': it is damaged"),
        (lambda t: with_nan(t, torch.inf), r"NaN or infinite numbers in 'layers\.3\.value'"),
        (lambda t: with_nan(t, -torch.inf), r"NaN or infinite numbers in 'layers\.3\.value'"),
    ],
)
def test_tensors_that_are_not_as_the_manifest_says(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    path = forge(tmp_path / "m.safetensors", lambda _, tensors: change(tensors))
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was loaded"):
        load(path)


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    path = forge(tmp_path / "m.safetensors", lambda manifest, _: manifest.update(version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=f"has memory format {FORMAT_VERSION + 1}; this locas .* reads") as caught:
        load(path)
    assert "Update locas" in str(caught.value)
    assert FORMAT == "locas-memory"  # the name that files carry: old ones must go on loading
