"""From a checkpoint to a Hugging Face folder in bfloat16; from a folder to pieces that can travel, and back."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch

from locas.store import write_atomically
from pretrain.settings import Preset
from pretrain.state import RESULT, load_checkpoint
from pretrain.twins import build

PIECE_BYTES = 15 * 2**20  # under 16 MiB, so that they travel where large files do not
_INDEX = "pieces.json"
_FORMAT = "locas pieces 1"


def export(run: Path, data: Path, out: Path) -> int:
    """Writes a run's weights, rounded to bfloat16, with configuration, tokenizer and result.

    Returns:
        The bytes of the weights.
    """
    saved = load_checkpoint(run)
    model = build(saved["name"], Preset(**saved["settings"]), saved["model"]["model.embed_tokens.weight"].shape[0])
    model.load_state_dict(saved["model"])
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    for path in sorted((data / "tokenizer").iterdir()):
        shutil.copyfile(path, out / path.name)
    write_atomically(out / "training.json", (run / RESULT).read_bytes())
    return (out / "model.safetensors").stat().st_size


def split(folder: Path, out: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Packs a folder's files into one archive, equal for equal contents, and cuts it into pieces with an index.

    Raises:
        FileExistsError: there are pieces already.
    """
    out.mkdir(parents=True, exist_ok=True)
    prefix = folder.name
    if any(out.glob(f"{prefix}.*")):
        raise FileExistsError(f"{out} already has pieces of {prefix}; give another folder, or remove them")
    data = _archive(folder)
    paths, rows = [], []
    for number, begin in enumerate(range(0, len(data), piece_bytes)):
        piece = data[begin : begin + piece_bytes]
        path = out / f"{prefix}.{number:02d}"
        write_atomically(path, piece)
        paths.append(path)
        rows.append({"file": path.name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
    index: dict[str, Any] = {"format": _FORMAT, "name": prefix, "pieces": rows}
    write_atomically(out / f"{prefix}.{_INDEX}", json.dumps(index, indent=1).encode())
    return paths


def _archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            data = path.read_bytes()
            info = tarfile.TarInfo(path.name)  # no times, owners or modes: nothing but names and contents
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def join(pieces: Path, name: str, out: Path) -> list[str]:
    """Puts the pieces of `name` together again, each checked, and unpacks them.

    Returns:
        The names of the files that were written.

    Raises:
        FileNotFoundError: the index or a piece is missing.
        ValueError: a piece is not what the index says. Nothing was written.
    """
    path = pieces / f"{name}.{_INDEX}"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder with the pieces, and the name they begin with")
    index = json.loads(path.read_text())
    if index.get("format") != _FORMAT:
        raise ValueError(f"{path} is not an index of pieces: its format is {index.get('format')!r}")
    data = b""
    for row in index["pieces"]:
        piece = pieces / row["file"]
        if not piece.exists():
            raise FileNotFoundError(f"{piece} is missing; fetch it again")
        content = piece.read_bytes()
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(
                f"{piece} is damaged (its sha256 is not the index's); fetch it again. Nothing was written."
            )
        data += content
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(out, filter="data")
        return archive.getnames()
