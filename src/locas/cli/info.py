"""`locas info`: what a memory file or a merged checkpoint contains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from locas.cli.common import OutputOptions, out, print_json
from locas.memory import load
from locas.unmerge import read_manifest


@dataclass(frozen=True)
class Info:
    """What a memory file contains: backbone, shape, what it has read, its settings.

    Of a folder that `locas merge` wrote: which memories are in it.

        locas info book.safetensors
        locas info merged
    """

    file: Annotated[str, tyro.conf.Positional]
    """A memory file, or a folder that `locas merge` wrote."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        if Path(self.file).is_dir():
            return self._merged()
        memory = load(self.file)
        manifest = memory.manifest()
        norms = {
            str(layer): {
                name: round(float(part[0].norm(dim=-1).mean()), 4)
                for name, part in zip(("gate", "key", "value"), (slots.g, slots.k, slots.v), strict=True)
                if part is not None
            }
            for layer in memory.bank.layers
            for slots in (memory.bank.slots(layer),)
        }
        size = Path(self.file).stat().st_size
        if self.show.json:
            print_json(manifest | {"parameters": memory.n_parameters, "file_bytes": size, "mean_row_norms": norms})
            return 0
        _describe(manifest, memory.n_parameters, size, norms)
        return 0

    def _merged(self) -> int:
        manifest = read_manifest(self.file)
        if self.show.json:
            inner = ("tensors", "shards", "files", "card")  # what un-merging needs, and no reader
            print_json({k: v for k, v in manifest.items() if k not in inner})
            return 0
        width = manifest["width"]
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        _row(table, "merged checkpoint", f"format {manifest['version']}, written by locas {manifest['library']}")
        _row(table, "backbone", f"{manifest['backbone']}  (fingerprint {manifest['backbone_fingerprint'][:12]})")
        _row(
            table,
            "FFN width",
            f"{width['original']:,} -> {width['merged']:,}  ({width['key']}, multiple of {width['align']})",
        )
        _row(table, "dtype", manifest["dtype"] or "as the backbone's")
        for about in manifest["memories"]:
            tokens = sum(d["tokens"] for d in about["manifest"]["documents"])
            rank, layers = _rank(about["manifest"]["ranks"]), len(about["manifest"]["ranks"])
            _row(
                table,
                "memory",
                f"{about['name']}: rank {rank} on {layers} layers, {tokens:,} tokens read  ({about['file']})",
            )
            if "compose" in about["manifest"].get("settings", {}):
                _describe_composed(table, about["manifest"]["settings"]["compose"])
        out.print(table)
        return 0


def _describe(manifest: dict[str, Any], parameters: int, size: int, norms: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    tokens = sum(d["tokens"] for d in manifest["documents"])
    _row(
        table, "memory", f"Locas-{manifest['variant'].upper()}, {manifest['activation']}, format {manifest['version']}"
    )
    _row(table, "backbone", f"{manifest['backbone']}  (fingerprint {manifest['backbone_fingerprint'][:12]})")
    if "frozen" in manifest:
        slots, total = sum(manifest["frozen"].values()), sum(manifest["ranks"].values())
        _row(table, "frozen", f"{slots:,} of {total:,} slots: reading on does not change them")
    _row(table, "parameters", f"{parameters:,}  ({size / 2**20:.2f} MiB)")
    _row(table, "read", f"{tokens:,} tokens in {_texts(len(manifest['documents']))}" if tokens else "nothing yet")
    for document in manifest["documents"]:
        _row(table, "", f"{document['name']}: {document['tokens']:,} tokens")
    for group, settings in manifest["settings"].items():
        if group == "compose":
            _describe_composed(table, settings)
        else:
            _row(table, f"settings: {group}", _flat(settings))
    _row(table, "written by", f"locas {manifest['library']}")
    out.print(table)
    layers = Table(box=None, pad_edge=False, header_style="bold")
    parts = list(next(iter(norms.values())))
    for name in ("layer", "rank", "tau", *(f"|{part}|" for part in parts)):
        layers.add_column(name, justify="right")
    for layer, rank in manifest["ranks"].items():
        layers.add_row(
            layer, str(rank), f"{manifest['tau'][layer]:.4g}", *(f"{norms[layer][part]:.3f}" for part in parts)
        )
    out.print()
    out.print(layers)


def _describe_composed(table: Table, composed: dict[str, Any]) -> None:
    """A row for each part of a composed memory, and for what was fitted."""
    for number, part in enumerate(composed["parts"], start=1):
        texts = ", ".join(d["name"] for d in part.get("documents", ())) or "nothing read"
        _row(
            table,
            f"composed part {number}",
            f"rank {_rank(part['ranks'])}, weight {part.get('weight', 1.0):g}: {texts}",
        )
    fit = composed.get("fit")
    if fit is not None:
        _row(
            table, "fitted", f"epochs {fit['epochs']}; nats a token from each part's own predictions, before and after:"
        )
        for number, text in enumerate(fit["texts"], start=1):
            change = f"{text['divergence_before']:.4f} -> {text['divergence']:.4f}"
            _row(table, "", f"part {number} on {text['tokens']:,} tokens: {change}")


def _row(table: Table, *cells: str) -> None:
    """A row of what stands there, brackets and all: names of files are no markup."""
    table.add_row(*map(Text, cells))


def _texts(n: int) -> str:
    return f"{n} text{'s' if n != 1 else ''}"


def _rank(ranks: dict[str, int]) -> str:
    found = sorted(set(ranks.values()))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _flat(settings: Any) -> str:
    if isinstance(settings, list):
        return ", ".join(f"({_flat(value)})" for value in settings)
    if not isinstance(settings, dict):
        return str(settings)
    return "  ".join(f"{k}={_flat(v)}" if not isinstance(v, dict) else f"{k}({_flat(v)})" for k, v in settings.items())
