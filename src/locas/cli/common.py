"""What the commands share: options, loading, printing."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from locas.backbone import Backbone, Dtype, load_backbone
from locas.bank import Bank
from locas.memory import Memory, load
from locas.run_settings import Text
from locas.text import Document, collect

T = TypeVar("T")
# An option that may be left out: its help text says what happens then, and "None" is not something to type.
Maybe = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="")]
STRENGTH = (
    "How strongly the memory acts: 1 as it was learnt, 0 not at all. 0.75 keeps nearly all that it knows of its text "
    "and changes other text half as much."
)
Strength = Annotated[float, tyro.conf.arg(help=STRENGTH)]


class UserError(Exception):
    """Something that the user can mend; its text is shown without a traceback."""


@dataclass(frozen=True)
class BackboneOptions:
    """Which backbone, where and how exactly."""

    model: Maybe[str] = None
    """Checkpoint folder, Hugging Face hub name, tiny-glu (built in; the default) or its two-layer twin tiny-mlp."""
    dtype: Dtype = "auto"
    """Precision of the backbone; auto: bfloat16 on CUDA, float32 on CPU. Memories are always float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or spread (over all devices, through accelerate)."""

    def load(self) -> Backbone:
        return load_backbone(self.model, dtype=self.dtype, device=self.device)


def backbone_memory(path: str, backbone: Backbone) -> Memory:
    """A memory from its file, checked against the model and tokenizer that will use it."""
    return load(path, backbone.model, tokenizer_sha256=backbone.tokenizer_sha256)


def check_memory(*paths: str | None) -> None:
    """Reads memory files (where there are any) before a backbone is loaded: a wrong path, or a file that is damaged or
    none of ours, is found at once."""
    for path in paths:
        if path is not None:
            load(path)


def check_strength(strength: float, memory: str | None) -> None:
    """Raises UserError where --strength is none, or has nothing to act on."""
    if not math.isfinite(strength):
        raise UserError(f"--strength is a number, 1 as the memory was learnt; got {strength}")
    if strength != 1 and memory is None:
        raise UserError("--strength says how strongly a memory acts: add --memory FILE, or leave it out")


def all_frozen(bank: Bank) -> bool:
    """Whether no slot of a memory can learn."""
    frozen = bank.frozen_rows()
    return frozen is not None and bool(frozen.all())


def check_folder(path: str) -> None:
    """Raises UserError where a folder for results cannot be made, before they are measured."""
    for part in (Path(path), *Path(path).parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{short(part)} is a file; -o names a folder")
            return


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how files become text."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """Text files, folders (all text files in them, sorted), or - for standard input."""
    gutenberg: bool = False
    """Strip the header and licence of Project Gutenberg e-books."""
    reflow: bool = False
    """Join hard-wrapped lines into paragraphs, one a line."""
    encoding: Maybe[str] = None
    """Encoding of the files; found out where not given."""
    max_tokens: Maybe[int] = None
    """Read at most so many tokens of each text."""

    def collect(self) -> list[Document]:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens must be 1 or more; got {self.max_tokens}")
        documents = collect(
            self.paths,
            gutenberg=self.gutenberg,
            reflow=self.reflow,
            encoding=self.encoding,
            on_skip=said_skipped,
        )
        if self.encoding is None:
            for encoding in sorted({d.encoding for d in documents} - {"utf-8"}):
                first, *others = (d.name for d in documents if d.encoding == encoding)
                more = f" and {len(others)} more" if others else ""
                err.print(f"read as {encoding} (--encoding overrules): {first}{more}", soft_wrap=True, markup=False)
        return documents

    def tokenize(self, documents: list[Document], backbone: Backbone) -> list[Text]:
        texts = []
        for document in documents:
            ids, n_bytes = backbone.encode(document.text, self.max_tokens)
            texts.append(Text(document.name, ids, n_bytes, document.sha256))
        return texts


@dataclass(frozen=True)
class OutputOptions:
    """How results are printed."""

    json: bool = False
    """Print the result as one JSON object on standard output; everything else goes to standard error."""


# Progress and messages go to standard error, results to standard output.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(result: dict[str, Any]) -> None:
    """One JSON object in ASCII, so that any terminal and any file name will do; NaN and infinity as null."""
    sys.stdout.write(json.dumps(_without_nan(result)) + "\n")
    sys.stdout.flush()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fail(error: Exception, as_json: bool, status: int = 2) -> int:
    """Prints an error as the user should see it; returns the exit status."""
    text = str(error) or repr(error)
    err.print(f"error: {text}", style="bold red", soft_wrap=True, markup=False)
    if as_json:
        print_json({"error": text})
    return status


def percent(new: float, old: float) -> str:
    """Relative change, as "-12.3%"."""
    return f"{100 * (new / old - 1):+.1f}%"


def comparison(results: dict[str, Any], with_name: str = "with memory") -> Table:
    """A table of figures with memory, and without where they are known."""
    baseline = results.get("baseline")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("perplexity", justify="right")
    table.add_column("bits per byte", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("seconds", justify="right")
    rows = [("without memory", baseline), (with_name, results)] if baseline else [(with_name, results)]
    for name, row in rows:
        table.add_row(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
        )
    if baseline:
        table.add_row(
            "change",
            percent(results["perplexity"], baseline["perplexity"]),
            percent(results["bits_per_byte"], baseline["bits_per_byte"]),
            "",
            "",
            style="bold",
        )
    return table


def said_skipped(path: str, why: str) -> None:
    """Says that a file of a folder is left out."""
    err.print(f"skipped {path}: it {why}", style="dim", soft_wrap=True, markup=False)


def brief_name(name: str) -> str:
    """The beginning of a file's name, for a bar."""
    return name if len(name) <= 24 else name[:23] + "…"


def short(path: str | Path) -> str:
    """A path quoted for the shell where that is needed."""
    return shlex.quote(str(path))


__all__ = [
    "STRENGTH",
    "BackboneOptions",
    "Maybe",
    "OutputOptions",
    "Strength",
    "TextOptions",
    "UserError",
    "all_frozen",
    "backbone_memory",
    "brief_name",
    "check_folder",
    "check_memory",
    "check_strength",
    "comparison",
    "err",
    "fail",
    "out",
    "percent",
    "print_json",
    "said_skipped",
    "short",
]
