"""A file is there whole or not at all, whatever happens while it is written."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

import locas.store
from helpers import same_bytes
from locas.memory import load
from locas.store import write_atomically
from memory_files import small_memory


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
