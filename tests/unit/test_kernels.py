"""Triton's kernels against float64: on CUDA as compiled, elsewhere by Triton's interpreter (see conftest.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from locas import kernels
from locas.bank import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


SHAPES = [(True, 64, 96, False), (False, 3, 1030, False), (True, 5, 70, True), (True, 1, 16, False)]
EVERY = [(shape, activation, dtype) for shape in SHAPES for activation in kernels.ACTIVATIONS for dtype in TOLERANCE]
MANY_SLOTS = ((False, 1031, 48, True), "gelu", torch.bfloat16)


@pytest.mark.parametrize(("shape", "activation", "dtype"), [*EVERY, MANY_SLOTS])
def test_a_tokens_memory(shape: tuple[bool, int, int, bool], activation: str, dtype: torch.dtype) -> None:
    gated, rank, d_model, each = shape
    g = torch.Generator().manual_seed(0)
    own = (3,) if each else ()
    a, onto, keys, values = (
        torch.randn(size, generator=g, dtype=torch.float64).to(DEVICE, dtype)
        for size in ((3, 1, d_model), (3, 1, d_model), (*own, rank * (1 + gated), d_model), (*own, rank, d_model))
    )
    keys, values = keys / d_model**0.5, values / rank**0.5
    found = kernels.read_token(a, keys, values, onto, activation)
    assert found.dtype == dtype
    slots = a.double() @ keys.double().mT
    made = ACTIVATIONS[activation](slots[..., :rank])
    expected = onto.double() + (made * slots[..., rank:] if gated else made) @ values.double()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# The interpreter takes a bfloat16 operand of a product for integers.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("width", kernels.HEAD_WIDTHS)
@pytest.mark.parametrize(("chunk", "copies"), [(150, 2), (128, 1), (7, 4)])
def test_the_gradient_of_attentions_values(dtype: torch.dtype, width: int, chunk: int, copies: int) -> None:
    g = torch.Generator().manual_seed(0)
    batch, heads, scale = 2, 4, width**-0.5
    # As a model's projections leave them: heads beside one another in a token's row.
    query, key, grad = (
        torch.randn(batch, chunk, n, width, generator=g, dtype=torch.float64).to(DEVICE, dtype).transpose(1, 2)
        for n in (heads, heads // copies, heads)
    )
    scores = query.double() @ key.double().repeat_interleave(copies, 1).mT * scale
    scores = scores.masked_fill(~torch.ones(chunk, chunk, dtype=torch.bool, device=DEVICE).tril(), -torch.inf)
    log_sum = scores.logsumexp(-1)
    whole = torch.full((batch, heads, 9 + chunk, width), torch.nan, dtype=dtype, device=DEVICE)
    kernels.values_gradient(grad, query, key, log_sum.float(), scale, whole[:, :, 9:])
    expected = (scores - log_sum[..., None]).exp().mT @ grad.double()
    assert (whole[:, :, 9:].double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    assert whole[:, :, :9].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above compile them for the GPU that is here")
def test_the_kernels_compile_for_gpus_that_need_not_be_here(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parents[1] / "compiled_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in made} == {"_slots_kernel", "_onto_kernel", "_values_kernel"}
    assert not any(each["spilled"] for each in made)
    desktop = [each for each in made if each["options"].get("num_stages", 2) == 2]
    assert max(each["shared"] for each in desktop) <= 99 * 1024  # what a program of a desktop card may have
    assert max(each["shared"] for each in made) <= kernels._ROOM
