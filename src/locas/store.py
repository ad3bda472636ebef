"""Files: named tensors and a JSON manifest in one `.safetensors`, written atomically, read without executing anything.

A file is either the old one or the new one, whenever the process or the machine stops. What is loaded is checked
completely before anybody sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows, where a second writer is not noticed
    fcntl = None  # type: ignore[assignment]

_KEY = "locas"  # the one entry of a file's metadata: a second would make the bytes depend on a hash order
_MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_DEPTH = 32  # of a manifest's nesting: what comes out of a file must never overflow a stack
_CHECKSUM = "sha256"  # of everything else in the file; stands in the manifest


def save_tensors(path: str | Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Writes tensors and manifest to `path`, atomically; equal contents give equal bytes.

    Raises:
        OSError: the folder does not exist or cannot be written, the disk is full, or another process is writing
            the same file. The old file, if any, is untouched.
        ValueError: the manifest holds NaN or infinite numbers.
    """
    try:
        plain = json.loads(json.dumps(manifest, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{path} was not written: NaN or infinite numbers in its manifest ({error})") from error
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Escaped, so that a file name which is not UTF-8 (it is a lone surrogate in Python) cannot fail at the end.
    text = json.dumps(plain | {_CHECKSUM: _checksum(contiguous, plain)}, sort_keys=True)
    write_atomically(path, safetensors.torch.save(contiguous, metadata={_KEY: text}))


def load_tensors(
    path: str | Path, *, kind: str, may_be_nan: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote.

    Args:
        path: the file.
        kind: what its manifest must call itself under "format".
        may_be_nan: beginnings of the names of tensors in which NaN has a meaning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, cut short, changed by so much as a bit, without our manifest, of another
            kind, or with NaN or infinite numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a {kind} is one .safetensors file")
    if not path.is_file():  # reading from a pipe would wait for ever
        raise ValueError(f"{path} is not a file but a pipe, a device or a socket; a {kind} is one .safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            manifest = _parse(path, text, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short, or something else altogether. "
            "Nothing was loaded."
        ) from error
    except (OSError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Nothing was loaded.") from error
    for name, tensor in tensors.items():
        if name.startswith(may_be_nan or ("\0",)) or not tensor.is_floating_point():
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{path} holds {tensor.dtype} in {name!r}, which none of ours does. Nothing was loaded.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinite numbers in {name!r}: it is damaged. Nothing was loaded.")
    if manifest.pop(_CHECKSUM, None) != _checksum(tensors, manifest):
        raise ValueError(f"{path} is damaged: its checksum does not fit its contents. Nothing was loaded.")
    return tensors, manifest


def _checksum(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> str:
    """SHA-256 over a manifest that came through JSON, and over the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parse(path: Path, text: str | None, kind: str) -> dict[str, Any]:
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file, but not one of ours: its metadata has no {_KEY!r} entry. "
            f"A {kind} is made by `locas memorize`. Nothing was loaded."
        )
    if len(text) > _MAX_MANIFEST_BYTES:
        raise ValueError(
            f"the manifest of {path} has {len(text)} characters, which none of ours has. Nothing was loaded."
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the manifest of {path} is not JSON ({error}). Nothing was loaded.") from error
    if _nested_deeper_than(_MAX_DEPTH, manifest):
        raise ValueError(
            f"the manifest of {path} is nested deeper than {_MAX_DEPTH}, which none of ours is. Nothing was loaded."
        )
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != kind:
        raise ValueError(f"{path} is not a {kind}: its manifest says {found!r}. Nothing was loaded.")
    assert isinstance(manifest, dict)
    return manifest


def _nested_deeper_than(depth: int, value: Any) -> bool:
    inner = [value]
    for _ in range(depth):
        inner = [x for y in inner if isinstance(y, dict | list) for x in (y.values() if isinstance(y, dict) else y)]
    return bool(inner)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replaces the file at `path` by `data`: complete on the disk before it gets its name.

    Raises:
        OSError: see `save_tensors`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it, or choose another output path")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    # One name for all attempts: what a killed process leaves behind, the next one overwrites and renames.
    temporary = path.with_name(f".{path.name}.tmp")
    with _locked(temporary, path.name) as file:
        file.truncate(0)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _locked(temporary: Path, name: str) -> Iterator[Any]:
    """The open temporary file, in which nobody else writes for now."""
    while True:
        with temporary.open("ab") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise OSError(
                        f"another process is writing {name}; wait for it, or use another output path"
                    ) from error
                except OSError:
                    pass  # some file systems have no locks
            # Between our opening and locking it, another writer may have finished and made it the real file.
            if _is_named(file, temporary):
                yield file
                return


def _is_named(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def tensor_dtype(tensors: dict[str, Tensor], path: str | Path) -> torch.dtype:
    """The one dtype of a memory's tensors.

    Raises:
        ValueError: there are several, or it is neither float32 nor float64.
    """
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) or "none"
        raise ValueError(f"{path} holds tensors of dtype {names}; a memory is float32. Nothing was loaded.")
    return dtypes.pop()
