"""`locas generate` and `locas chat`: let a backbone speak, with a memory or without."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from locas.backbone import Backbone
from locas.cli.common import (
    STRENGTH,
    BackboneOptions,
    Maybe,
    OutputOptions,
    Strength,
    UserError,
    all_frozen,
    backbone_memory,
    check_memory,
    check_strength,
    err,
    out,
    print_json,
)
from locas.forward import device_of, trained_context
from locas.initialise import InitSettings
from locas.memory import Memory, create, record_reading
from locas.run_memories import check_output
from locas.run_settings import PRESETS
from locas.stream import Reader, ReadSettings


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: int = 80
    """Longest continuation, in tokens."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that have this probability together."""
    seed: int = 0
    """Of the random choice."""

    def check(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be 1 or more; got {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"--temperature is 0 or more and --top-p in (0, 1]; got {self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, with a memory or without.

    Tokens are drawn at random, the same ones for the same --seed; --temperature 0 takes the likeliest.

        locas generate "Call me" --memory moby.safetensors --compare
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """The text to continue; - reads it from standard input."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    memory: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    """A memory file made with this backbone."""
    strength: Strength = 1.0
    compare: bool = False
    """Also continue without the memory."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    show: OutputOptions = field(default_factory=OutputOptions)

    def run(self) -> int:
        self.sampling.check()
        if self.compare and self.memory is None:
            raise UserError("--compare shows what a memory changes: add --memory FILE, or leave it out")
        check_strength(self.strength, self.memory)
        check_memory(self.memory)
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        backbone = self.backbone.load()
        memory = backbone_memory(self.memory, backbone).scaled(self.strength) if self.memory else None
        ids = prompt_ids(backbone, prompt)
        text = continuation(backbone, memory, ids, self.sampling)
        plain = continuation(backbone, None, ids, self.sampling) if self.compare and memory else None
        if self.show.json:
            result = {"prompt": prompt, "text": text} | ({"baseline": {"text": plain}} if plain is not None else {})
            print_json(result)
            return 0
        if plain is not None:
            out.print("without memory:", style="bold")
            out.print(prompt + plain, soft_wrap=True, markup=False)
            out.print("\nwith memory:", style="bold")
        out.print(prompt + text, soft_wrap=True, markup=False)
        return 0


# Chosen on conversations (LOG.md). Every message is read by itself, behind the conversation so far: nothing is kept.
_LISTENING = replace(PRESETS["default"].read, reuse=False, chunk=128)


@dataclass(frozen=True)
class Chat:
    """Talk with the backbone; with --learn, what you say is written into the memory, and is there the next time.

    One message a line; an empty line or Ctrl-D ends the conversation. The backbone's own replies are not learnt.

        locas chat --memory me.safetensors --learn
    """

    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    memory: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    """A memory file made with this backbone; with --learn it is created where it does not exist."""
    strength: Annotated[float, tyro.conf.arg(help=f"{STRENGTH} What is learnt is not changed by it.")] = 1.0
    learn: bool = False
    """Write each of your messages into the memory file."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    read: ReadSettings = field(default_factory=lambda: _LISTENING)
    rank: int = 64
    """Slots for each layer, where --learn creates the memory."""

    def run(self) -> int:
        self.sampling.check()
        if self.learn and not self.memory:
            raise UserError("--learn needs a file to write into: add --memory FILE")
        if not self.learn and (self.rank != Chat.rank or self.read != _LISTENING):
            raise UserError("--rank, --window, --chunk and how else to write say nothing without --learn; add it")
        check_strength(self.strength, self.memory)
        there = self.memory if self.memory and (not self.learn or Path(self.memory).exists()) else None
        check_memory(there)
        backbone = self.backbone.load()
        memory = backbone_memory(there, backbone) if there else None
        listener = (
            _Listener(backbone, memory, self.memory, self.rank, self.read) if self.learn and self.memory else None
        )
        if listener is not None:
            listener.check()
        conversation = _Conversation(backbone, self.sampling)
        for message in _messages():
            reply = conversation.answer(message, memory and memory.scaled(self.strength))
            out.print(reply, soft_wrap=True, markup=False)
            if listener is not None:
                memory = listener.learn(*conversation.with_message(message))
            conversation.hear(message, reply)
        return 0


_CHAT = "<chat>"  # what a message is called in a memory's provenance


class _Listener:
    """Writes messages into a memory, and the memory into its file. The writer goes on from message to message: a short
    one makes a short step, and steps become shorter with what has been said, in earlier conversations too."""

    def __init__(self, backbone: Backbone, memory: Memory | None, path: str, rank: int, settings: ReadSettings) -> None:
        self.backbone, self.memory, self.path, self.rank, self.settings = backbone, memory, path, rank, settings
        self._writer: dict[str, Tensor] | None = None

    def check(self) -> None:
        """Raises ValueError or OSError where learning would: at the start, not after the first reply."""
        check_output(Path(self.path))
        self.settings.sizes(self.backbone.model)
        if self.memory is None:
            self._fresh(self.backbone.encode("You")[0])
        elif all_frozen(self.memory.bank):
            raise UserError(f"every slot of {self.path} is frozen: nothing can be learnt; choose another --memory")

    def _fresh(self, ids: Tensor) -> Memory:
        return create(
            self.backbone.model, ids, InitSettings(rank=self.rank), start_id=self.backbone.start_id,
            name=self.backbone.name, tokenizer_sha256=self.backbone.tokenizer_sha256,
        )  # fmt: skip

    def learn(self, ids: Tensor, first: int) -> Memory:
        """Reads the conversation's tokens from `first` on; those before are context."""
        model, start_id = self.backbone.model, self.backbone.start_id
        if self.memory is None:
            self.memory = self._fresh(ids)
        reader = Reader(model, self.memory.bank, [ids], self.settings, start_id=start_id, first_token=first)
        assert reader.writer is not None
        if self._writer is None:
            reader.writer.counts += sum(document.name == _CHAT for document in self.memory.provenance.documents)
        else:
            reader.writer.load_state(self._writer)
        for _ in reader:
            pass
        self._writer = reader.writer.state()
        record_reading(self.memory, ids[first:], self.settings, name=_CHAT)
        self.memory.save(self.path)
        return self.memory


class _Conversation:
    """The words of both sides, in the tokenizer's chat template, or as a plain script where it has none."""

    def __init__(self, backbone: Backbone, sampling: SamplingOptions) -> None:
        self.backbone, self.sampling = backbone, sampling
        self.turns: list[dict[str, str]] = []

    def _text(self, turns: list[dict[str, str]], *, to_continue: bool) -> str:
        tokenizer = self.backbone.tokenizer
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=to_continue))
        names = {"user": "You", "assistant": "Me"}
        text = "".join(f"{names[t['role']]}: {t['content']}\n" for t in turns)
        return text + ("Me:" if to_continue else "")

    def answer(self, message: str, memory: Memory | None) -> str:
        """What the backbone says to it."""
        prompt = prompt_ids(self.backbone, self._text([*self.turns, _said("user", message)], to_continue=True))
        stop = None if self.backbone.tokenizer.chat_template else ["\n"]
        return continuation(self.backbone, memory, prompt, self.sampling, stop).strip()

    def with_message(self, message: str) -> tuple[Tensor, int]:
        """[n] token ids of the conversation with this message at its end, and the message's first."""
        ids = prompt_ids(self.backbone, self._text([*self.turns, _said("user", message)], to_continue=False))
        if not self.turns:
            return ids, 0
        before = prompt_ids(self.backbone, self._text(self.turns, to_continue=False))
        same = min(before.numel(), ids.numel())
        different = (before[:same] != ids[:same]).nonzero()
        first = int(different[0]) if different.numel() else same
        return ids, min(first, ids.numel() - 1)

    def hear(self, message: str, reply: str) -> None:
        """Adds an exchange."""
        self.turns += [_said("user", message), _said("assistant", reply)]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages() -> Any:
    """Lines that the user types (or pipes), until an empty one or the end."""
    while True:
        try:
            if sys.stdin.isatty():
                err.print("> ", end="", style="bold")
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line.strip():
            return
        yield line.strip()


def prompt_ids(backbone: Backbone, text: str) -> Tensor:
    """[n] token ids of a prompt, without the start token, also where the text (of a chat template, say) begins with it:
    whoever reads the prompt puts one before it."""
    if not text.strip():
        raise UserError("the prompt is empty; give some words to continue")
    ids = backbone.encode(text)[0]
    begun = backbone.start_id is not None and ids.numel() > 1 and int(ids[0]) == backbone.start_id
    return ids[1:] if begun else ids


@torch.no_grad()
def continuation(
    backbone: Backbone, memory: Memory | None, ids: Tensor, sampling: SamplingOptions, stop: list[str] | None = None
) -> str:
    """What the model says after `ids`; the oldest tokens are left out where the context is too short for all.

    Raises:
        UserError: the continuation alone does not fit into the trained context.
    """
    context = trained_context(backbone.model)
    lead = [backbone.start_id] if backbone.start_id is not None else []
    if context is not None:
        room = context - sampling.max_new_tokens - len(lead)
        if room < 1:
            raise UserError(
                f"--max-new-tokens {sampling.max_new_tokens} leaves no room for the prompt: this backbone was trained "
                f"for {context} tokens; use {context // 2} or less"
            )
        lead = lead if backbone.start_in_every_window or ids.numel() <= room else []
        ids = ids[-room:]
    inputs = torch.cat([torch.tensor(lead, dtype=torch.int64), ids])[None].to(device_of(backbone.model))
    torch.manual_seed(sampling.seed)
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if stop:
        how |= {"stop_strings": stop, "tokenizer": backbone.tokenizer}
    attached: AbstractContextManager[Any] = memory.attached(backbone.model) if memory else nullcontext()
    pad = backbone.tokenizer.pad_token_id
    pad = backbone.tokenizer.eos_token_id if pad is None else pad
    with attached:
        output = backbone.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            **how,
        )
    text = str(backbone.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
    for word in stop or []:
        text = text.split(word)[0]
    return text
