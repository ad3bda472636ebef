"""Compiles Triton's kernels for GPUs that need not be here: `python compiled_kernels.py`, a JSON line for each.

In a process of its own, since Triton either compiles or interprets (TRITON_INTERPRET, see conftest.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from locas import kernels

CAPABILITIES = (80, 90, 120)  # Ampere, Hopper, desktop Blackwell


def compiled(kernel: Any, capability: int, pointers: str, constants: dict[str, int], **options: int) -> dict[str, Any]:
    """Bytes of shared memory, registers, and bytes of registers that did not fit. Pointers: "name:type ..."."""
    types = dict(pair.split(":") for pair in pointers.split())
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    at = {n: (kernel.arg_names.index(n),) for n in kernel.arg_names}
    # As launched: everything on multiples of 16, as a model's shapes are; copies then go on behind the products.
    attributes = {at[n]: [["tt.divisibility", 16]] for n, type_ in signature.items() if type_ == "i32" or "*" in type_}
    source = ASTSource(kernel, signature, {at[n]: value for n, value in constants.items()}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.findall(p, said)[-1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return {
        "kernel": kernel.__name__, "capability": capability, "constants": constants, "options": options,
        "shared": made.metadata.shared, "registers": registers, "spilled": spilled,
    }  # fmt: skip


def main() -> None:
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp32"):
            pointers = f"a:*{dtype} keys:*{dtype} onto:*{dtype} values:*{dtype} out:*{dtype} slots:*fp32"
            gated = {"GATED": True, "ACTIVATION": 0, **kernels._SLOTS_TILE}
            print(json.dumps(compiled(kernels._slots_kernel, capability, pointers, gated)))
            print(json.dumps(compiled(kernels._onto_kernel, capability, pointers, kernels._ONTO_TILE)))
        for width in kernels.HEAD_WIDTHS:
            for stages in (2, 3):
                pointers = "query:*bf16 key:*bf16 grad:*bf16 out:*bf16 log_sum:*fp32 scale:fp32"
                tile = kernels._values_tile(width)
                options = {"num_warps": 4, "num_stages": stages}
                print(json.dumps(compiled(kernels._values_kernel, capability, pointers, tile, **options)))


if __name__ == "__main__":
    main()
