"""Bits per byte of a backbone on whole books, read without memory; samples; the model card and the checksums."""

from __future__ import annotations

import hashlib
import json
import lzma
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import locas
from locas.backbone import Backbone
from locas.store import write_atomically
from locas.text import decode, one_paragraph_a_line, reflow, strip_gutenberg
from pretrain.books import FORMS
from pretrain.report import draw_curve, environment

WINDOW, CHUNK = 2048, 1024
PROMPTS = ("", "It was a dark night, and", "“I do not know,” said")  # no space at the end: words begin with theirs
SAMPLE_TOKENS, TEMPERATURE = 80, 0.8


def books(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text between Project Gutenberg's marks) of each .txt or .txt.xz of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(p for p in folder.iterdir() if p.name.endswith((".txt", ".txt.xz"))) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder} has no books (*.txt, *.txt.xz); give the folder of the development books")
    for path in paths:
        raw = path.read_bytes()
        text, _ = decode(lzma.decompress(raw) if path.suffix == ".xz" else raw, name=str(path))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield path.name.split(".")[0], strip_gutenberg(text, name=str(path))


def score(backbone: Backbone, text: str, max_tokens: int | None = None) -> dict[str, Any]:
    """A text's bits per byte and perplexity, read in windows of 2,048 tokens, 1,024 at a time, without memory."""
    ids, n_bytes = backbone.encode(text, max_tokens)
    window, chunk = _sizes(backbone)
    settings = locas.ReadSettings(window=window, chunk=chunk)
    records = list(locas.read(backbone.model, None, ids, settings, start_id=backbone.start_id))
    total = locas.Score.of(torch.cat([record.nll for record in records]), n_bytes)
    return {
        "tokens": total.tokens, "bytes": total.n_bytes, "nll": total.nll, "bits_per_byte": total.bits_per_byte,
        "perplexity": total.perplexity,
    }  # fmt: skip


def _sizes(backbone: Backbone) -> tuple[int, int]:
    """Window and chunk, in tokens: ours, or what fits into a shorter context."""
    trained = backbone.model.config.max_position_embeddings
    return min(WINDOW, trained), min(CHUNK, trained // 2)


def samples(backbone: Backbone) -> list[dict[str, Any]]:
    """The first continuation drawn for each prompt: none is chosen."""
    drawn = []
    for seed, prompt in enumerate(PROMPTS):
        ids = [backbone.start_id, *backbone.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        out = _draw(backbone, ids, seed)
        drawn.append({"seed": seed, "prompt": prompt, "text": backbone.tokenizer.decode(out[1:])})
    return drawn


@torch.no_grad()
def _draw(backbone: Backbone, ids: list[int], seed: int) -> list[int]:
    """Plain sampling, in float64 on the CPU, so that a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    device = next(backbone.model.parameters()).device
    for _ in range(SAMPLE_TOKENS):
        logits = backbone.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        chances = (logits.double().cpu() / TEMPERATURE).softmax(-1)
        ids = [*ids, int(torch.multinomial(chances, 1, generator=generator))]
    return ids


def evaluate(
    model: Path, folder: Path, *, device: str, max_tokens: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Scores every book in both forms, draws samples, writes evaluation.json.

    For what this recipe trained also README.md and SHA256SUMS; any other causal model can be evaluated beside it.
    """
    backbone = locas.load_backbone(str(model), device=device)
    began = time.perf_counter()
    rows = []
    for name, text in books(folder):
        for form in FORMS:
            shown = one_paragraph_a_line(reflow(text)) if form == "reflowed" else text
            rows.append({"book": name, "form": form, **score(backbone, shown, max_tokens)})
            say(f"{name} {form}: {rows[-1]['bits_per_byte']:.4f} bits/byte, {time.perf_counter() - began:.0f} s")
    result = {
        "format": "locas pretraining evaluation 1",
        "model_sha256": _sha256(model / "model.safetensors"),
        "window": _sizes(backbone)[0],
        "chunk": _sizes(backbone)[1],
        "max_tokens": max_tokens,
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "environment": environment(torch.device(next(backbone.model.parameters()).device)),
        "seconds": time.perf_counter() - began,
        "books": rows,
        "mean_bits_per_byte": {f: _mean([r["bits_per_byte"] for r in rows if r["form"] == f]) for f in FORMS},
        "temperature": TEMPERATURE,
        "samples": samples(backbone),
    }
    write_atomically(model / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False).encode())
    if (model / "training.json").exists():
        write_card(model)
    return result


def write_card(model: Path) -> None:
    """The model card and loss curve, all from training.json, evaluation.json and config.json; then the checksums."""
    training, evaluation, config = (
        json.loads((model / f"{name}.json").read_text()) for name in ("training", "evaluation", "config")
    )
    has_curve = draw_curve(training["history"], model / "curve.png", training["name"])
    write_atomically(model / "README.md", _card(training, evaluation, config, has_curve).encode())
    sums = [f"{_sha256(p)}  {p.name}\n" for p in sorted(model.iterdir()) if p.is_file() and p.name != "SHA256SUMS"]
    write_atomically(model / "SHA256SUMS", "".join(sums).encode())


def _card(training: dict[str, Any], evaluation: dict[str, Any], config: dict[str, Any], has_curve: bool) -> str:
    settings, where, data = training["settings"], training["environment"], training["data"]
    ffn = "gated FFN" if config["model_type"] == "qwen3" else "two-layer FFN"
    train = sum(shard["tokens"] for shard in data["shards"] if shard["split"] == "train")
    table = ["| book | as it stands | re-flowed |", "| --- | --- | --- |"]
    by_book = {(row["book"], row["form"]): row["bits_per_byte"] for row in evaluation["books"]}
    for book in sorted({row["book"] for row in evaluation["books"]}, key=lambda b: (len(b), b)):
        table.append(f"| {book} | {by_book[book, FORMS[0]]:.3f} | {by_book[book, FORMS[1]]:.3f} |")
    mean = evaluation["mean_bits_per_byte"]
    table.append(f"| mean | {mean[FORMS[0]]:.3f} | {mean[FORMS[1]]:.3f} |")
    valid = next((row for row in reversed(training["history"]) if FORMS[0] in row), None)
    validation = ", ".join(f"{form} {valid[form]['bits_per_byte']:.3f}" for form in FORMS) if valid else "not measured"
    part = f" (the first {evaluation['max_tokens']:,} tokens of each)" if evaluation["max_tokens"] else ""
    curve = "![Loss while training](curve.png)\n" if has_curve else ""
    drawn = "\n\n".join(
        f"Seed {s['seed']}, prompt `{s['prompt'] or '(none)'}`:\n\n" + _quoted(s["text"]) for s in evaluation["samples"]
    )
    return f"""# {training["name"]}

A small language model of English books, one of the two built-in backbones of locas; made by `recipes/pretrain`.

{config["model_type"]} architecture of transformers, {training["n_parameters"] / 1e6:.2f}M parameters: \
d_model {config["hidden_size"]}, {config["num_hidden_layers"]} layers, {config["num_attention_heads"]} heads with \
{config["num_key_value_heads"]} key heads, {ffn} of {config["intermediate_size"]} ({config["hidden_act"]}), context of \
{config["max_position_embeddings"]:,} tokens, tied embeddings, byte-level BPE of {config["vocab_size"]:,}, bfloat16.

Trained from scratch on {training["tokens"] / 1e6:.1f}M tokens ({training["tokens"] / train:.1f} times over \
{train / 1e6:.1f}M) of public-domain English books, half with their hard wraps, half re-flowed, some with typographic \
quotes and dashes; step {training["step"]} of {training["n_steps"]}, {training["seconds"] / 60:.0f} minutes on \
{where["device"]}, learning rate {settings["lr"]:g}, seed {settings["seed"]}, commit {where["commit"]}. All else is in \
training.json. None of the books below was trained on.

## Bits per byte

Development books{part}, read without memory: windows of {evaluation["window"]:,} tokens, {evaluation["chunk"]:,} \
scored at a time, {evaluation["dtype"]}.

{chr(10).join(table)}

Validation during training, bits per byte: {validation}.

{curve}
## Samples

The first ones drawn, temperature {evaluation["temperature"]:g}:

{drawn}

## Limits and licence

It writes English sentences and knows next to nothing; old books bring old prejudices. Its text was ASCII, besides \
the quotes and dashes that the recipe put there. Public-domain data; the weights carry the project's licence.
"""


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" if line else ">" for line in text.split("\n"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
