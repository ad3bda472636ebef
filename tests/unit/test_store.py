"""Files: what is written comes back bit for bit, and nothing else ever comes out of a file."""

import copy
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

import locas.store
from families import tiny_model
from helpers import fill, memory_for, same_bytes, snapshot
from locas.bank import Bank
from locas.memory import FORMAT, FORMAT_VERSION, DocumentRead, Memory, Provenance, load
from locas.sites import fingerprint
from locas.store import load_tensors, save_tensors, write_atomically

D_MODEL, RANKS = 5, {0: 2, 3: 7}


def small_memory() -> Memory:
    """A memory without a backbone: two layers of different rank, one text read, one with a name in Greek."""
    documents = (DocumentRead("a.txt", 11, "0" * 64, "1" * 64), DocumentRead("β.txt", 13, "2" * 64))
    provenance = Provenance("tiny", "ab" * 32, "cd" * 32, documents, {"init": {"rank": 2}, "read": {"chunk": None}})
    return Memory(fill(Bank("glu", "silu", D_MODEL, RANKS)), provenance)


def contents(memory: Memory) -> tuple[dict[str, Any], Tensor, Tensor]:
    return json.loads(json.dumps(memory.manifest())), memory.bank.rows, memory.bank.tau


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(a file to overwrite, the bytes of a real memory file)."""
    path = tmp_path_factory.mktemp("store") / "m.safetensors"
    small_memory().save(path)
    return path, path.read_bytes()


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """A file whose maker knows our format, checksum and all, and who lies in it."""
    memory = small_memory()
    manifest = json.loads(json.dumps(memory.manifest()))
    tensors = memory.tensors()
    change(manifest, tensors)
    save_tensors(path, tensors, manifest)
    return path


def raw_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


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


# -------------------------------------------------------------------- hostile files


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


# -------------------------------------------------------------------- atomicity


@pytest.mark.parametrize(
    ("where", "name"), [(locas.store.os, "fsync"), (Path, "replace"), (locas.store.safetensors.torch, "save")]
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    path = tmp_path / "m.safetensors"
    small_memory().save(path)
    before = path.read_bytes()
    other = small_memory()
    other.bank.rows.neg_()

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        with pytest.raises(OSError, match="the disk is full"):
            other.save(path)
    assert path.read_bytes() == before
    other.save(path)
    assert same_bytes(load(path).bank.rows, other.bank.rows)


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    path = tmp_path / "m.safetensors"
    write_atomically(path, b"old" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == b"old" * 1000
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_data_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "m.safetensors", []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        size = os.fstat(descriptor).st_size if name != tmp_path.name else None
        events.append(("fsync", name, size))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        events.append(("replace", self.name, target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(path, b"x" * 1009)
    temporary = ".m.safetensors.tmp"
    assert events == [
        ("fsync", temporary, 1009),
        ("replace", temporary, "m.safetensors"),
        ("fsync", tmp_path.name, None),
    ]


def test_what_a_killed_process_leaves_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    (tmp_path / ".m.safetensors.tmp").write_bytes(b"half a file" * 1000)
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    path = tmp_path / "m.safetensors"
    write_atomically(path, b"old")
    with (tmp_path / ".m.safetensors.tmp").open("ab") as other:
        other.write(b"what the other has so far")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        message = "another process is writing m.safetensors; wait for it, or use another output path"
        with pytest.raises(OSError, match=re.escape(message)):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert (tmp_path / ".m.safetensors.tmp").read_bytes() == b"what the other has so far"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_writer_that_comes_while_another_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the temporary file, which the other then renames into place: that one is no longer ours."""
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    path, flock = tmp_path / "m.safetensors", fcntl.flock

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        write_atomically(path, b"the other's")
        flock(file, how)

    def fail(self: Path, target: Path) -> None:
        raise OSError("stopped just before the end")

    (tmp_path / ".m.safetensors.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours"

    write_atomically(path, b"")
    (tmp_path / ".m.safetensors.tmp").touch()
    replace = Path.replace

    def late_and_fail(file: Any, how: int) -> None:
        late(file, how)
        monkeypatch.setattr(Path, "replace", fail)

    monkeypatch.setattr(fcntl, "flock", late_and_fail)
    with pytest.raises(OSError, match="stopped just before the end"):
        write_atomically(path, b"ours")
    monkeypatch.setattr(Path, "replace", replace)
    assert path.read_bytes() == b"the other's"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_atomically(tmp_path / "m.safetensors", b"x")
    assert (tmp_path / "m.safetensors").read_bytes() == b"x"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist; create it, or choose another"):
        write_atomically(tmp_path / "nowhere" / "m.safetensors", b"x")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        write_atomically(tmp_path, b"x")
    assert list(tmp_path.iterdir()) == []


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
