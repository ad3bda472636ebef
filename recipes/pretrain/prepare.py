"""Training text to tokens: the tokenizer, and one compressed shard of 16-bit ids for each file of the text."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from locas.store import write_atomically
from pretrain.books import FORMS, Book, draw, files, form_of, prepared, read_books, style_of
from pretrain.settings import END_OF_TEXT

VOCAB = 8192
SAMPLE_CHARS = 40_000  # of each book, from its middle: what the tokenizer is trained on
# Ids as little-endian pairs of bytes; of the settings tried, 3 bits of literal context and one of position pack best.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26, "lc": 3, "lp": 1, "pb": 1, "nice_len": 128}]


def train_tokenizer(texts: Iterator[str], vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE with token 0 for the start of a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def sample(books: Iterator[Book], seed: int) -> Iterator[str]:
    """What the tokenizer learns from: the middle of every book, in the book's own form and typography."""
    for book in books:
        start = max(0, (len(book.text) - SAMPLE_CHARS) // 2)
        start = book.text.rfind("\n", 0, start) + 1 if start else 0
        piece = Book(book.source, book.text[start : start + SAMPLE_CHARS], book.sha256)
        yield prepared(piece, seed)


def pack(ids: NDArray[np.uint16]) -> bytes:
    """Token ids as the bytes of a shard."""
    return lzma.compress(ids.astype("<u2").tobytes(), format=lzma.FORMAT_XZ, filters=_FILTERS)


def unpack(data: bytes) -> NDArray[np.uint16]:
    """What `pack` packed."""
    return np.frombuffer(lzma.decompress(data), "<u2")


def load_split(folder: str | Path, split: str) -> NDArray[np.uint16]:
    """All tokens of "train", "valid-wrapped" or "valid-reflowed", checked against the manifest.

    Raises:
        FileNotFoundError: nothing was prepared there, or a shard is missing.
        ValueError: a shard is not the one in the manifest.
    """
    folder = Path(folder)
    parts = []
    for shard in load_manifest(folder)["shards"]:
        if shard["split"] != split:
            continue
        path = folder / shard["file"]
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: copy the whole of {folder}, or run `main.py prepare` again")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise ValueError(f"{path} is not the shard in manifest.json; run `main.py prepare` again")
        parts.append(unpack(data))
    return np.concatenate(parts)


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """What `prepare` wrote about its shards."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run `main.py prepare` first (or copy {folder})")
    return json.loads(path.read_text())


def prepare(
    source: Path, out: Path, *, share: float, seed: int, drop: frozenset[str], vocab: int = VOCAB
) -> dict[str, Any]:
    """Trains the tokenizer, writes shards and manifest.

    Args:
        source: folder with train-*.txt.xz and valid.txt.xz.
        out: where tokenizer/, *.u16.xz and manifest.json go.
        share: of the training books, drawn by hash, that are kept (the shards must travel).
        seed: of all draws.
        drop: sources of books that must not be trained on.
        vocab: entries of the tokenizer.
    """
    out.mkdir(parents=True, exist_ok=True)
    train_files = files(source)
    began = time.perf_counter()

    def kept(path: Path) -> Iterator[Book]:
        return (b for b in read_books(path) if b.source not in drop and draw(b, seed, "keep") < share)

    tokenizer = train_tokenizer(sample((book for path in train_files for book in kept(path)), seed), vocab)
    tokenizer.save_pretrained(out / "tokenizer")
    print(f"tokenizer of {len(tokenizer)} tokens after {time.perf_counter() - began:.0f} s", flush=True)
    shards, books = [], []
    for path in train_files:
        chosen = list(kept(path))
        if not chosen:
            continue
        ids, rows = _encode(tokenizer, chosen, seed)
        shards.append(_write_shard(out, path.name.removesuffix(".txt.xz"), "train", ids, rows))
        books += rows
        print(f"{path.name}: {len(chosen)} books, {ids.size:,} tokens, {time.perf_counter() - began:.0f} s", flush=True)
    valid = [book for path in files(source, "valid") for book in read_books(path)]
    for form in FORMS:
        ids, rows = _encode(tokenizer, valid, seed, form)
        shards.append(_write_shard(out, f"valid-{form}", f"valid-{form}", ids, rows))
        books += rows
    manifest = {
        "format": "locas pretraining shards 1",
        "seed": seed,
        "share": share,
        "vocab": len(tokenizer),
        "dropped": sorted(drop),
        "sources": {p.name: _sha256(p) for p in [*train_files, *files(source, "valid")]},
        "tokenizer_sha256": _sha256(out / "tokenizer" / "tokenizer.json"),
        "shards": shards,
        "books": books,
    }
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return manifest


def _encode(
    tokenizer: PreTrainedTokenizerFast, books: list[Book], seed: int, form: str | None = None
) -> tuple[NDArray[np.uint16], list[dict[str, Any]]]:
    """The ids of some books, each with the start token before it, and a row for the manifest about each."""
    if len(tokenizer) > 2**15:
        raise ValueError(f"{len(tokenizer)} tokens do not fit into 15 bits; use a smaller --vocab")
    parts, rows = [], []
    for book in books:
        text = prepared(book, seed, form=form)
        ids = [0, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
        parts.append(np.array(ids, np.uint16))
        rows.append({
            "source": book.source, "title": book.title, "form": form or form_of(book, seed),
            "style": style_of(book, seed), "tokens": len(ids), "bytes": len(text.encode()),
        })  # fmt: skip
    return np.concatenate(parts), rows


def _write_shard(
    out: Path, name: str, split: str, ids: NDArray[np.uint16], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    data = pack(ids)
    write_atomically(out / f"{name}.u16.xz", data)
    return {
        "split": split, "file": f"{name}.u16.xz", "tokens": int(ids.size), "text_bytes": sum(r["bytes"] for r in rows),
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip


def copy_books(folder: Path, out: Path) -> int:
    """Packs the development books, to be evaluated on where the shared folder is not; returns bytes written."""
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for path in sorted(folder.glob("*.txt")):
        data = lzma.compress(path.read_bytes(), preset=9)
        write_atomically(out / f"{path.name}.xz", data)
        total += len(data)
    return total


def summary(manifest: dict[str, Any]) -> str:
    """What a reader wants to know of the shards, in a few lines."""
    train = [row for row in manifest["books"] if row["source"].startswith("train")]
    lines = []
    for key in ("form", "style"):
        counts: dict[str, list[int]] = {}
        for row in train:
            entry = counts.setdefault(row[key], [0, 0])
            entry[0] += 1
            entry[1] += row["tokens"]
        lines += [f"{key} {name}: {n} books, {tokens:,} tokens" for name, (n, tokens) in sorted(counts.items())]
    for split in ("train", *(f"valid-{form}" for form in FORMS)):
        own = [s for s in manifest["shards"] if s["split"] == split]
        tokens, text, packed = (sum(s[k] for s in own) for k in ("tokens", "text_bytes", "bytes"))
        lines.append(
            f"{split}: {tokens:,} tokens, {text / tokens:.3f} bytes a token, packed to {packed / 2**20:.2f} MiB "
            f"({8 * packed / tokens:.2f} bits a token)"
        )
    return "\n".join(lines)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clear(out: Path) -> None:
    """Removes what an earlier `prepare` left, and nothing else."""
    for path in [*out.glob("*.u16.xz"), out / "manifest.json"]:
        path.unlink(missing_ok=True)
    if (out / "tokenizer").is_dir():
        shutil.rmtree(out / "tokenizer")
