"""A small memory without a backbone, its file, and files that lie."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers import fill
from locas.bank import Bank
from locas.memory import DocumentRead, Memory, Provenance
from locas.store import save_tensors

D_MODEL, RANKS = 5, {0: 2, 3: 7}


def small_memory() -> Memory:
    """A memory without a backbone: two layers of different rank, one text read, one with a name in Greek."""
    documents = (DocumentRead("a.txt", 11, "0" * 64, "1" * 64), DocumentRead("β.txt", 13, "2" * 64))
    provenance = Provenance("tiny", "ab" * 32, "cd" * 32, documents, {"init": {"rank": 2}, "read": {"chunk": None}})
    return Memory(fill(Bank("glu", "silu", D_MODEL, RANKS)), provenance)


def contents(memory: Memory) -> tuple[dict[str, Any], Tensor, Tensor]:
    return json.loads(json.dumps(memory.manifest())), memory.bank.rows, memory.bank.tau


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
