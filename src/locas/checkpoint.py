"""Hugging Face checkpoint folders as they lie on the disk: found, read tensor by tensor, written shard by shard.

No model is built here and no shard is held in memory: a tensor is mapped from its file, changed, written, dropped.
A shard's header is kept as text, so that a file can be written again byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from locas.backbone import _BUILT_IN, built_in

try:
    import fcntl
except ImportError:  # not on Windows, where a second writer is not noticed
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"  # a list of the files' hashes, which other weights make untrue
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Weights in other containers are left behind: they would not be widened, and some programs prefer them.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
_TEMPLATES = "additional_chat_templates"  # the one subfolder that transformers reads


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard, as its header describes it (dtype in safetensors' spelling, e.g. "BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class Shard:
    """One weights file: its header as text, and its tensors in the order in which their bytes lie there."""

    path: Path
    header: str
    entries: tuple[Entry, ...]

    @property
    def metadata(self) -> dict[str, str] | None:
        """The header's free part, e.g. {"format": "pt"}."""
        return json.loads(self.header).get("__metadata__")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors weights.

    Attributes:
        folder: where it is.
        config_text: config.json as it stands.
        index_text: of the shards; None where one file holds all.
        shards: in the order of their names.
    """

    folder: Path
    config_text: str
    index_text: str | None
    shards: tuple[Shard, ...]

    @property
    def config(self) -> dict[str, Any]:
        """config.json, parsed anew at each call."""
        return json.loads(self.config_text)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @cached_property
    def _paths(self) -> dict[str, Path]:
        return {entry.name: shard.path for shard in self.shards for entry in shard.entries}

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file; its pages go with it."""
        with safetensors.safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)

    def other_files(self) -> list[Path]:
        """Everything beside weights and config that an ordinary checkpoint has, relative to the folder: tokenizer,
        generation settings, chat templates, licence, card."""
        files = [path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        files += [path for path in (self.folder / _TEMPLATES).glob("*") if path.is_file()]
        return sorted(
            path.relative_to(self.folder)
            for path in files
            if path.name != CONFIG and not path.name.endswith(_OTHER_WEIGHTS)
        )


# -------------------------------------------------------------------- finding and reading


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: a folder itself, a built-in backbone, or a hub snapshot (fetched if need be).

    Raises:
        ValueError: there is none of that name.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in built_in():
        return _BUILT_IN / name
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"]))
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"it has no {CONFIG} (or none was fetched before going offline).")
        wanted = sorted(set(_weight_map(folder).values())) if (folder / INDEX).exists() else [WEIGHTS]
        huggingface_hub.snapshot_download(name, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"the checkpoint {name!r} was not found: {first.rstrip('.')}. Name it with --model: a folder with "
            f"config.json and safetensors weights, a name on the Hugging Face hub, or a built-in "
            f"backbone ({', '.join(built_in())})."
        ) from error
    return folder


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads config, index and headers; no tensor.

    Raises:
        FileNotFoundError: no config or no safetensors weights; the message says what to do.
        ValueError: a damaged file.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {CONFIG}")
    if (folder / WEIGHTS).is_file():  # what transformers takes first, too
        names, index_text = [WEIGHTS], None
    elif (folder / INDEX).is_file():
        names, index_text = sorted(set(_weight_map(folder).values())), read_text(folder / INDEX)
    else:
        raise FileNotFoundError(
            f"{folder} has no safetensors weights ({WEIGHTS} or {INDEX}); write it anew in that format with "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(FOLDER), and its tokenizer likewise"
        )
    shards = tuple(_open_shard(folder / name) for name in names)
    checkpoint = Checkpoint(folder, read_text(folder / CONFIG), index_text, shards)
    if sum(len(shard.entries) for shard in shards) != len(checkpoint.entries):
        raise ValueError(f"{folder} holds a tensor of the same name in several of its files; it is damaged")
    if index_text is not None and (missing := _weight_map(folder).keys() - checkpoint.entries.keys()):
        raise ValueError(f"the index of {folder} names tensors that no file holds, e.g. {min(missing)!r}")
    return checkpoint


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        names = dict(json.loads(read_text(folder / INDEX))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of shards ({error!r})") from error
    for name in names.values():
        check_plain_name(name)
    return names


def check_plain_name(name: object) -> str:
    """`name`, if it is a file's name and no path. ValueError: it is not."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} should be the name of a file in the same folder")
    return name


def _open_shard(path: Path) -> Shard:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch the checkpoint again")
    try:
        with safetensors.safe_open(path, framework="pt"):  # checks offsets and length
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); it may be cut short") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length).decode()
    return Shard(path, header, entries_of(header))


def entries_of(header: str) -> tuple[Entry, ...]:
    """The tensors that a safetensors header describes, in the order of their bytes.

    Raises:
        ValueError: it is none.
    """
    try:
        tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
        order = sorted(tensors, key=lambda name: tensors[name]["data_offsets"])
        entries = []
        for name in order:
            start, stop = tensors[name]["data_offsets"]
            entries.append(Entry(name, tensors[name]["dtype"], tuple(tensors[name]["shape"]), stop - start))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the header of a safetensors file ({error!r})") from error
    return tuple(entries)


# -------------------------------------------------------------------- writing


def header_of(entries: Iterable[Entry], metadata: dict[str, str] | None) -> str:
    """A safetensors header for tensors that follow in this order, padded to a multiple of eight bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for entry in entries:
        stop = start + entry.n_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"))  # ASCII: characters are bytes
    return text + " " * (-len(text) % 8)


def resized(entry: Entry, shape: tuple[int, ...], dtype: torch.dtype | None) -> Entry:
    """An entry of another shape and, where `dtype` is given, of that dtype."""
    name = entry.dtype if dtype is None else DTYPE_NAMES[dtype]
    if shape == entry.shape and name == entry.dtype:
        return entry
    return Entry(entry.name, name, shape, math.prod(shape) * DTYPES[name].itemsize)


def write_shard(path: Path, header: str, tensors: Iterable[Tensor]) -> None:
    """Writes a safetensors file tensor by tensor, in the order of the header's offsets, and syncs it."""
    encoded = header.encode()
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry, tensor in zip(entries_of(header), tensors, strict=True):
            data = bytes_of(tensor)
            assert len(data) == entry.n_bytes, f"{entry.name}: {len(data)} bytes where the header says {entry.n_bytes}"
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_text(path: Path) -> str:
    """A UTF-8 text file with the line ends that it has. Raises ValueError if it is none."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); mend it or move it away") from error


def write_text(path: Path, text: str) -> None:
    """A synced text file with the line ends that `text` has."""
    with path.open("xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """A synced copy of a file's bytes."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def check_output(output: Path, source: Path, n_bytes: int) -> None:
    """Raises OSError or ValueError unless a folder of `n_bytes` can come into being at `output`."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already; choose another -o, or remove it first")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist; create it, or choose another -o")
    if source.resolve() in output.resolve().parents:
        raise ValueError(f"{output} lies inside the checkpoint {source}, which stays as it is; choose another -o")
    free = shutil.disk_usage(output.absolute().parent).free
    if free < n_bytes:
        raise OSError(
            f"{output} would take {n_bytes / 2**30:.2f} GiB, and {output.absolute().parent} has {free / 2**30:.2f} GiB "
            "free; free some space, or choose another -o. Nothing was written."
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that gets its name when the block ends well, and goes if it does not.

    What a killed process left under the temporary name is replaced.

    Raises:
        OSError: another process is writing there, or the folder cannot be written.
    """
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.partial")
    temporary.mkdir(exist_ok=True)
    with _locked(temporary):
        try:
            _empty(temporary)
            yield temporary
            for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
                _sync(folder)
            if output.exists():
                output.rmdir()  # empty, as check_output saw to
            temporary.rename(output)
            _sync(output.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not (_lock(handle) and _is(folder, handle)):
            raise OSError(f"another process is writing {folder}; wait for it, or choose another -o")
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether nobody else holds a lock on it. Where folders cannot be locked (NFS among others), it goes without."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is(folder: Path, handle: int) -> bool:
    """Whether it is still the one that was opened: another process may have renamed or replaced it before the lock."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except OSError:
        return False


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
