"""Loading a backbone and its tokenizer: built in, from a folder, or by its name on a model hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

_BUILT_IN = Path(__file__).parent / "backbones"
DEFAULT_BACKBONE = "tiny-glu"


@dataclass(frozen=True)
class Backbone:
    """A causal language model with its tokenizer.

    Attributes:
        name: as it was asked for.
        model: the transformers model, in evaluation mode.
        tokenizer: the transformers tokenizer.
        start_id: the token that goes before a text's first one: BOS, or EOS where there is no BOS; None: neither.
        start_in_every_window: whether the tokenizer itself puts BOS before every text, so that the model expects to
            see it at the start of whatever it reads.
        tokenizer_sha256: hash of the tokenizer's definition.
    """

    name: str
    model: Any
    tokenizer: Any
    start_id: int | None
    start_in_every_window: bool
    tokenizer_sha256: str

    @property
    def n_parameters(self) -> int:
        """Numbers in the model, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def encode(self, text: str, max_tokens: int | None = None) -> tuple[Tensor, int]:
        """Token ids of a text without any special token added, and how many UTF-8 bytes of it they cover.

        Args:
            text: the text.
            max_tokens: keep only so many of the first tokens.

        Returns:
            [n] int64 ids, and the bytes.

        Raises:
            ValueError: the text has no tokens, or max_tokens is below 1.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more; got {max_tokens}")
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = torch.tensor(encoded["input_ids"][:max_tokens], dtype=torch.int64)
        if ids.numel() == 0:
            raise ValueError("the text has no tokens: it is empty, or blank")
        if ids.numel() == len(encoded["input_ids"]):
            return ids, len(text.encode())
        if not fast:
            return ids, len(self.tokenizer.decode(ids).encode())
        return ids, len(text[: encoded["offset_mapping"][ids.numel() - 1][1]].encode())


def built_in() -> list[str]:
    """Names of the backbones that the package carries."""
    return sorted(path.parent.name for path in _BUILT_IN.glob("*/config.json"))


def load_backbone(name: str | None = None, *, dtype: Dtype = "auto", device: str = "auto") -> Backbone:
    """Loads a causal language model and its tokenizer.

    Args:
        name: one of `built_in()`, a folder, or a name on the Hugging Face hub; None: the built-in default.
        dtype: "auto": bfloat16 on CUDA, float32 on CPU.
        device: "auto" (CUDA where present), "cpu", "cuda", "cuda:1", ..., or "spread" over all devices (needs
            accelerate).

    Raises:
        ValueError: no such model, no tokenizer, a damaged or incomplete checkpoint, or a device that is not there.
        MemoryError, RuntimeError: there is not enough memory for it (`is_out_of_memory`), with a note that says so.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = name or DEFAULT_BACKBONE
    source = str(_BUILT_IN / name) if name in built_in() and not Path(name).exists() else name
    where = _device(device)
    chosen = dtype if dtype != "auto" else ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    placed: dict[str, Any] = {"device_map": "auto"} if device == "spread" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: nn.Module
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, chosen), output_loading_info=True, **placed
        )
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"its weights are incomplete: {sorted(info['missing_keys'])[0]} is missing")
        if device != "spread":
            model.to(where)
    except Exception as error:  # transformers and what it calls raise nearly everything
        if is_out_of_memory(error):
            error.add_note(f"while the model {name!r} was loaded in {chosen}")
            raise
        first = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
        raise ValueError(
            f"the model {name!r} could not be loaded: {first}. Give a folder with config.json, weights and tokenizer, "
            f"a name on the Hugging Face hub, or one of the built-in backbones: {', '.join(built_in())}."
        ) from error
    model.eval()
    start_id, everywhere = start_token(tokenizer)
    return Backbone(name, model, tokenizer, start_id, everywhere, tokenizer_hash(tokenizer))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, torch's on a GPU, or that of torch's allocator on a CPU,
    which has no type of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("DefaultCPUAllocator", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _device(device: str) -> torch.device:
    if device in ("auto", "spread"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is not a device; use auto, cpu, cuda, cuda:1 or spread") from error
    try:
        if where.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError
        torch.zeros(1).to(where).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError, for "meta", is a RuntimeError
        raise ValueError(
            f"there is no {device.upper()} device here; use --device cpu (or leave --device out)"
        ) from error
    return where


def start_token(tokenizer: Any) -> tuple[int | None, bool]:
    """(token before a text, whether the tokenizer itself puts it before every text)."""
    bos = tokenizer.bos_token_id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    expects = bos is not None and special[:1] == [bos] and plain[:1] != [bos]
    return (bos if bos is not None else tokenizer.eos_token_id), expects


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a tokenizer's definition: what it does to a text depends on nothing else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for passing in ("truncation", "padding"):  # state of the last call, not part of the tokenizer
        definition.pop(passing, None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
