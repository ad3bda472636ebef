"""`locas compose`: several memory files into one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from locas.cli.common import OutputOptions, out, print_json
from locas.compose import compose
from locas.memory import load


@dataclass(frozen=True)
class Compose:
    """Put several memories of one backbone side by side in one file; their effects add up.

    locas compose a.safetensors b.safetensors -o both.safetensors
    """

    memories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MEMORY")]
    """Memory files of one backbone."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """The memory file to write (.safetensors)."""
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        memory = compose([load(path) for path in self.memories])
        memory.save(self.output)
        manifest, size = memory.manifest(), Path(self.output).stat().st_size
        if self.show.json:
            print_json(manifest | {"parameters": memory.n_parameters, "file_bytes": size})
            return 0
        ranks = sorted(set(memory.bank.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        out.print(
            f"[bold]{self.output}[/bold]: rank {rank} on {len(memory.bank.layers)} layers, "
            f"{memory.n_parameters:,} parameters, {size / 2**20:.1f} MiB",
            soft_wrap=True,
        )
        return 0
