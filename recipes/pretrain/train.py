"""The training loop of one twin: stops cleanly, says how it goes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas.store import write_atomically
from pretrain.batches import Batches, spread
from pretrain.books import FORMS
from pretrain.optimiser import learning_rate
from pretrain.prepare import load_manifest, load_split
from pretrain.report import environment
from pretrain.state import CHECKPOINT, RESULT, Run
from pretrain.twins import flops_a_token, n_parameters


def mean_loss(model: nn.Module, windows: Tensor, autocast: bool) -> Tensor:
    """Cross-entropy in nats a token of windows [n, context + 1]: matrices in bfloat16 on CUDA, the sum in float32."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def cut(windows: Tensor, length: int) -> Tensor:
    """[n * context / length, length + 1] pieces of windows [n, context + 1]: every target once, with less before it."""
    return windows.unfold(1, length + 1, length).flatten(0, 1)


def train(
    run: Run,
    data: Path,
    *,
    minutes: float = math.inf,
    until_step: int | None = None,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Trains until the last step, the time or the step that is given; leaves a checkpoint and a result.

    Returns:
        Whether the run is complete.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    began, before = time.monotonic(), run.seconds
    device = next(run.model.parameters()).device
    batches = Batches(load_split(data, "train"), run.preset.context, run.preset.seed, device)
    loss_of = _loss_function(run.model, device, compiled)
    valid = {
        f: spread(load_split(data, f"valid-{f}"), run.preset.context, run.preset.valid_windows, device) for f in FORMS
    }
    bytes_a_token = _bytes_a_token(data)
    last = min(run.preset.n_steps, until_step or run.preset.n_steps)
    say(describe(run, batches, device, compiled))
    total, since, mark = torch.zeros((), device=device), 0, time.monotonic()
    while run.step < last and time.monotonic() - began < 60 * minutes:
        total += _step(run, batches, loss_of)
        run.step, since = run.step + 1, since + 1
        run.seconds = before + time.monotonic() - began
        if run.step % run.preset.log_every == 0 or run.step == last:
            loss = total.item() / since  # the one place where the host waits for the device
            _log(run, loss, since, time.monotonic() - mark, say)
            total, since, mark = torch.zeros((), device=device), 0, time.monotonic()
        if run.step % run.preset.valid_every == 0 or run.step == run.preset.n_steps:
            _validate(run, valid, loss_of, bytes_a_token, say)
            run.save()
            mark = time.monotonic()
    if device.type == "cuda":
        torch.cuda.synchronize()
    run.seconds = before + time.monotonic() - began
    run.save()
    done = run.step >= run.preset.n_steps
    write_result(run, data, device, compiled)
    say(f"{'finished' if done else 'stopped'} at step {run.step} of {run.preset.n_steps}; {run.folder / CHECKPOINT}")
    return done


def _loss_function(model: nn.Module, device: torch.device, compiled: bool) -> Callable[[Tensor], Tensor]:
    autocast = device.type == "cuda"

    def loss_of(windows: Tensor) -> Tensor:
        return mean_loss(model, windows, autocast)

    return torch.compile(loss_of, dynamic=False) if compiled else loss_of


def _step(run: Run, batches: Batches, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """One step; returns its mean loss, on the device."""
    preset = run.preset
    windows = batches.take(run.step * preset.batch, preset.batch)
    total = torch.zeros((), device=windows.device)
    for micro in windows.split(preset.micro_batch):
        loss = loss_of(cut(micro, preset.context_at(run.step))) * (preset.micro_batch / preset.batch)
        loss.backward()
        total += loss.detach()
    run.optimiser.step(run.step)
    return total


def _log(run: Run, loss: float, steps: int, seconds: float, say: Callable[[str], None]) -> None:
    preset, per_s = run.preset, steps * run.preset.tokens_a_step / seconds
    left = (preset.n_steps - run.step) * preset.tokens_a_step / per_s
    lr = learning_rate(run.step - 1, preset)
    tokens = run.step * preset.tokens_a_step
    say(
        f"{run.name} step {run.step}/{preset.n_steps} {tokens / 1e6:.1f}M tokens loss {loss:.4f} lr {lr:.2e} "
        f"{per_s:,.0f} tokens/s, {left / 60:.1f} min left"
    )
    run.history.append({
        "step": run.step, "tokens": tokens, "loss": loss, "lr": lr, "tokens_per_s": per_s, "seconds": run.seconds
    })  # fmt: skip
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {run.step}; lower --lr and start again with another --run"
        )


def _validate(
    run: Run,
    valid: dict[str, Tensor],
    loss_of: Callable[[Tensor], Tensor],
    bytes_a_token: dict[str, float],
    say: Callable[[str], None],
) -> None:
    context = run.preset.context_at(run.step - 1)
    row: dict[str, Any] = {"step": run.step, "tokens": run.step * run.preset.tokens_a_step, "context": context}
    for form, windows in valid.items():
        # With gradients, though none are needed: so the compiled graph is the training step's own.
        losses = [loss_of(cut(w, context)).detach() * len(w) for w in windows.split(run.preset.micro_batch)]
        loss = torch.stack(losses).sum().item() / len(windows)
        row[form] = {"loss": loss, "bits_per_byte": loss / math.log(2) / bytes_a_token[form]}
    run.history.append(row)
    text = ", ".join(f"{f} loss {row[f]['loss']:.4f} ({row[f]['bits_per_byte']:.4f} bits/byte)" for f in valid)
    say(f"{run.name} step {run.step} validation at {context} tokens: {text}")


def _bytes_a_token(data: Path) -> dict[str, float]:
    shards = {shard["split"]: shard for shard in load_manifest(data)["shards"]}
    return {form: shards[f"valid-{form}"]["text_bytes"] / shards[f"valid-{form}"]["tokens"] for form in FORMS}


def describe(run: Run, batches: Batches, device: torch.device, compiled: bool) -> str:
    """The run in two lines, said before it starts."""
    n, preset = n_parameters(run.model), run.preset
    work = sum(flops_a_token(preset, n, preset.context_at(s)) for s in range(preset.n_steps)) * preset.tokens_a_step
    return (
        f"{run.name}, preset {preset.name}: {n / 1e6:.2f}M parameters, {preset.n_steps} steps of "
        f"{preset.tokens_a_step:,} tokens ({preset.n_steps * preset.batch / batches.per_epoch:.2f} epochs), "
        f"{work:.2e} FLOP\n"
        f"on {device}{', compiled' if compiled else ''}, from step {run.step}"
    )


def write_result(run: Run, data: Path, device: torch.device, compiled: bool) -> None:
    """The JSON file with everything needed to repeat the run, and how it went."""
    manifest = load_manifest(data)
    result = {
        "format": "locas pretraining result 1",
        "name": run.name,
        "step": run.step,
        "n_steps": run.preset.n_steps,
        "tokens": run.step * run.preset.tokens_a_step,
        "n_parameters": n_parameters(run.model),
        "seconds": run.seconds,
        "settings": run.preset.as_dict(),
        "compiled": compiled,
        "flops_a_token": flops_a_token(run.preset, n_parameters(run.model), run.preset.context),
        "environment": environment(device),
        "data": {
            k: manifest[k] for k in ("seed", "share", "vocab", "dropped", "sources", "tokenizer_sha256", "shards")
        },
        "history": run.history,
    }
    write_atomically(run.folder / RESULT, json.dumps(result, indent=1).encode())
