"""Answers of a backbone: how likely given ones are, and which one it gives by itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from locas.backbone import Backbone
from locas.forward import IGNORED, call, decoder, device_of, frozen, token_nll


def answer_nll(backbone: Backbone, prompt: Tensor, answers: Sequence[Tensor]) -> list[float]:
    """How unlikely each answer is after the prompt.

    The prompt is run once, and its keys and values are shared by all answers.

    Args:
        backbone: model and tokenizer; a memory may be attached.
        prompt: [n] token ids, n >= 1, any start token included.
        answers: [m] token ids each, m >= 1.

    Returns:
        Each answer's negative log-likelihood, summed over its tokens, in nats.
    """
    model, device = backbone.model, device_of(backbone.model)
    prompt = prompt.to(device)[None]
    longest = max(a.numel() for a in answers)
    # Rows are padded on the right, where nothing that is causal sees it.
    targets = torch.full((len(answers), longest), IGNORED, dtype=torch.int64, device=device)
    for i, answer in enumerate(answers):
        targets[i, : answer.numel()] = answer.to(device)
    inputs = torch.cat([prompt[:, -1:].expand(len(answers), 1), targets[:, :-1].clamp(min=0)], dim=1)
    with frozen(model), torch.no_grad():
        past: dict[str, Any] = {}
        if prompt.shape[1] > 1:
            cache = call(decoder(model), prompt[:, :-1], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(answers))
            past = {"past_key_values": cache, "use_cache": True}
        nll = token_nll(call(model, inputs, **past).logits, targets)
    return [float(x) for x in nll.double().sum(dim=1)]


def generate_answers(backbone: Backbone, prompts: Sequence[Tensor], *, max_new_tokens: int, batch: int) -> list[str]:
    """The likeliest next tokens, greedily, up to the first line break.

    Args:
        backbone: model and tokenizer; a memory may be attached.
        prompts: [n] token ids each, any start token included.
        max_new_tokens: length of an answer at most.
        batch: prompts at once, those of similar length together, padded on the left; of equal length only where the
            backbone cannot stand padding (BLOOM in transformers 5 answers it with NaN).

    Returns:
        An answer for each prompt, without white space around it; may be empty.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].numel())
    lengths = [p.numel() for p in prompts]
    alike = [order] if padding_is_harmless(backbone) else [list(g) for _, g in groupby(order, lengths.__getitem__)]
    for chosen in (some[i : i + batch] for some in alike for i in range(0, len(some), batch)):
        for i, text in zip(chosen, _generate(backbone, [prompts[i] for i in chosen], max_new_tokens), strict=True):
            answers[i] = text
    return answers


def padding_is_harmless(backbone: Backbone) -> bool:
    """Whether the model says the same about a text when padding stands before it: asked of the model itself."""
    model, device = backbone.model, device_of(backbone.model)
    ids = torch.arange(5, device=device)[None]
    padded, mask = torch.cat([ids[:, :3], ids], dim=1), torch.ones(1, 8, dtype=torch.int64, device=device)
    mask[:, :3] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as `generate` makes them
    takes = "position_ids" in inspect.signature(model.forward).parameters
    with frozen(model), torch.no_grad():
        alone = call(model, ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
        beside = call(model, padded, attention_mask=mask, **({"position_ids": positions} if takes else {}))
    return torch.allclose(alone, beside.logits[0, -1].float(), rtol=0.05, atol=0.05 * float(alone.std()))


def _generate(backbone: Backbone, prompts: list[Tensor], max_new_tokens: int) -> list[str]:
    tokenizer, device = backbone.tokenizer, device_of(backbone.model)
    longest = max(p.numel() for p in prompts)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.numel() :] = prompt.to(device)
        mask[row, longest - prompt.numel() :] = 1
    with frozen(backbone.model), torch.no_grad():
        output = backbone.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            stopping_criteria=[_LineEnds(tokenizer, longest)],
        )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [_first_line(text) for text in texts]


def _first_line(text: str) -> str:
    """The first line that says something: a model may begin with a line break, which is no end of an answer."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


class _LineEnds:
    """A row ends with the first line that says something."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :], skip_special_tokens=True)
        done = ["\n" in text.lstrip() for text in texts]
        return torch.tensor(done, device=input_ids.device)
