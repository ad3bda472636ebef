"""`locas merge` and `locas unmerge`: memories into a checkpoint, and out again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from locas.cli.common import Maybe, OutputOptions, err, out, print_json, short
from locas.merge import MEMORIES, MergeDtype, OnProgress, merge
from locas.unmerge import memory_names, unmerge


@dataclass(frozen=True)
class Merge:
    """Write a checkpoint that contains memories: an ordinary model, which needs no locas.

    Its FFNs are widened by the memories' slots. The backbone's own checkpoint is only read, tensor by tensor.

        locas merge book.safetensors -o merged
        locas merge a.safetensors b.safetensors -o merged --model Qwen/Qwen3-0.6B-Base
    """

    memories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MEMORY", help_behavior_hint="")]
    """Memory files of one backbone; their effects add up."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """The folder to make."""
    model: Maybe[str] = None
    """The backbone: a folder, a hub name, or a built-in one. Not given: what the first memory names."""
    align: int = 256
    """The new FFN width is a multiple of this; 256 suits 4-bit kernels and GGUF, 1024 tensor parallelism."""
    dtype: MergeDtype = "stored"
    """float32 or float64 widens the whole checkpoint, so that the memory's numbers are not rounded to e.g. bfloat16."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        began = time.monotonic()
        with _bar("merging") as on_progress:
            manifest = merge(
                self.memories,
                self.output,
                model=self.model,
                align=self.align,
                dtype=self.dtype,
                on_progress=on_progress,
            )
        width = manifest["width"]
        if self.show.json:
            print_json(_summary(manifest, self.output, began))
            return 0
        out.print(
            f"[bold]{escape(str(self.output))}[/bold]: {escape(manifest['backbone'])} with {_count(manifest)}, "
            f"{width['key']} {width['original']:,} -> {width['merged']:,}, {_size(self.output) / 2**20:,.1f} MiB",
            soft_wrap=True,
        )
        out.print("[dim]any program that loads transformers checkpoints loads it; locas is not needed[/dim]")
        out.print(f"back again: locas unmerge {short(self.output)} -o DIR", style="dim", soft_wrap=True, markup=False)
        return 0


@dataclass(frozen=True)
class Unmerge:
    """Give back the checkpoint that a merged one was made from, byte for byte, and the memories as files.

    The folder gets its name when all of it is written and the checkpoint's hashes are what they were.

        locas unmerge merged -o original
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that `locas merge` wrote."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """The folder to make."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        began = time.monotonic()
        with _bar("unmerging") as on_progress:
            manifest = unmerge(self.folder, self.output, on_progress=on_progress)
        files = [str(Path(self.output, MEMORIES, name)) for name in memory_names(manifest)]
        if self.show.json:
            print_json(_summary(manifest, self.output, began) | {"memories": files})
            return 0
        out.print(
            f"[bold]{escape(str(self.output))}[/bold]: {escape(manifest['backbone'])}, byte for byte as it was "
            "(checked)",
            soft_wrap=True,
        )
        for file in files:
            out.print(f"  {file}", soft_wrap=True, markup=False)
        return 0


def _summary(manifest: dict[str, Any], output: str, began: float) -> dict[str, Any]:
    return {
        "output": output,
        "backbone": manifest["backbone"],
        "backbone_fingerprint": manifest["backbone_fingerprint"],
        "width": manifest["width"],
        "dtype": manifest["dtype"],
        "memories": [about["name"] for about in manifest["memories"]],
        "tensors": len(manifest["tensors"]),
        "bytes": _size(output),
        "seconds": round(time.monotonic() - began, 3),
    }


def _count(manifest: dict[str, Any]) -> str:
    n = len(manifest["memories"])
    return "1 memory" if n == 1 else f"{n} memories"


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@contextmanager
def _bar(what: str) -> Iterator[OnProgress | None]:
    """A live bar on a terminal; elsewhere a line for each tenth of work that takes long."""
    if not err.is_terminal:
        yield _Lines(what)
        return
    columns = (TextColumn(what), BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """A line now and then, and none in the first seconds."""

    def __init__(self, what: str) -> None:
        self.what, self.last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            err.print(f"{self.what}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB")
