"""One memory with its provenance: create it, read into it, attach it, save it, load it.

memory = locas.create(model, ids, rank=64)
for record in locas.read(model, memory, ids):
    print(record.stop, record.nll.mean())
memory.save("book.safetensors")

memory = locas.load("book.safetensors", model)
with memory.attached(model):
    model.generate(...)
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locas._version import __version__
from locas.attach import Attachment, attached, check_fit
from locas.bank import Bank
from locas.initialise import InitSettings, create_bank, without_auto
from locas.sites import find_sites, fingerprint
from locas.store import load_tensors, save_tensors, tensor_dtype
from locas.stream import ChunkRecord, Reader, ReadSettings

FORMAT = "locas-memory"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DocumentRead:
    """One text that a memory has read.

    Attributes:
        name: of the file, or what the caller said.
        tokens: how many were read.
        ids_sha256: of the token ids that were read, as little-endian int64.
        text_sha256: of the text in UTF-8, where it is known.
    """

    name: str
    tokens: int
    ids_sha256: str
    text_sha256: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a memory comes from; all of it stands in its file.

    Attributes:
        backbone: name or path of the model, as it was loaded.
        backbone_fingerprint: hash of its FFN weights and shape, see `locas.sites.fingerprint`.
        tokenizer_sha256: hash of the tokenizer, None where only token ids were seen.
        documents: what was read, in order.
        settings: of its initialisation and of its last reading, resolved.
        library: the locas version that wrote it.
    """

    backbone: str
    backbone_fingerprint: str
    tokenizer_sha256: str | None = None
    documents: tuple[DocumentRead, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    library: str = __version__


class Memory:
    """A long-term memory for one backbone.

    Attributes:
        bank: its tensors, a bank of one.
        provenance: which backbone it fits, and what it has read.
    """

    def __init__(self, bank: Bank, provenance: Provenance, model: nn.Module | None = None) -> None:
        if bank.size != 1:
            raise ValueError(f"a memory is a bank of one; this bank holds {bank.size} (use bank.select(i))")
        self.bank = bank
        self.provenance = provenance
        self._fits: weakref.ref[nn.Module] | None = None if model is None else weakref.ref(model)

    @property
    def n_parameters(self) -> int:
        """How many numbers it holds."""
        return self.bank.n_parameters

    def attached(self, model: nn.Module) -> AbstractContextManager[Attachment]:
        """Puts the memory beside the model's FFNs for the length of a `with` block.

        Raises:
            ValueError: the model is not the backbone that the memory was made with; nothing was attached.
        """
        self.check(model)
        return attached(model, self.bank)

    def scaled(self, strength: float) -> Memory:
        """A copy with `strength` times the output: a dial between the backbone, 0, and all that was learnt, 1.

            with memory.scaled(0.75).attached(model):
                ...

        Of a finished memory, three quarters keep nearly all of the gain and half of the change elsewhere
        (docs/results.md, "Forgetting").

        Raises:
            ValueError: not a finite number.
        """
        if not math.isfinite(strength):
            raise ValueError(f"a memory's strength must be a finite number, 1 as it was learnt; got {strength}")
        before = self.provenance.settings.get("strength")  # a file may say anything
        noted = strength * (before if isinstance(before, int | float) else 1.0)
        provenance = replace(self.provenance, settings={**self.provenance.settings, "strength": noted})
        scaled = Memory(self.bank.scaled(strength), provenance)
        scaled._fits = self._fits
        return scaled

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless this memory was made with this very backbone."""
        if self._fits is not None and self._fits() is model:
            return
        check_fit(model, self.bank)
        found = fingerprint(model)
        if found != self.provenance.backbone_fingerprint:
            raise ValueError(
                f"this memory was made with the backbone {self.provenance.backbone!r} (fingerprint "
                f"{self.provenance.backbone_fingerprint[:12]}), but this model's FFN weights are others "
                f"({found[:12]}); load the backbone that it was made with"
            )
        self._fits = weakref.ref(model)

    def save(self, path: str | Path) -> None:
        """Writes the memory to one `.safetensors` file, atomically.

        Raises:
            ValueError: the memory holds NaN or infinite numbers; nothing was written.
            OSError: the folder does not exist or cannot be written; an old file is untouched.
        """
        if not bool(self.bank.rows.isfinite().all() and self.bank.tau.isfinite().all()):
            raise ValueError("this memory holds NaN or infinite numbers and was not saved")
        save_tensors(path, self.tensors(), self.manifest())

    def tensors(self) -> dict[str, Tensor]:
        """{layers.I.gate, layers.I.key, layers.I.value: [rank, d_model]}."""
        tensors = {}
        for layer in self.bank.layers:
            slots = self.bank.slots(layer)
            for name, part in (("gate", slots.g), ("key", slots.k), ("value", slots.v)):
                if part is not None:
                    tensors[f"layers.{layer}.{name}"] = part[0]
        return tensors

    def manifest(self) -> dict[str, Any]:
        """What the file says about itself, as JSON."""
        bank = self.bank
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "variant": bank.variant,
            "activation": bank.activation,
            "d_model": bank.d_model,
            "ranks": {str(layer): rank for layer, rank in bank.ranks.items()},
            "tau": {str(layer): float(bank.tau[0, i]) for i, layer in enumerate(bank.layers)},
            **({"frozen": self.frozen} if any(self.frozen.values()) else {}),
            **asdict(self.provenance),
        }

    @property
    def frozen(self) -> dict[str, int]:
        """How many of each layer's slots, the first ones, no write changes: {"I": slots}."""
        return {str(layer): int(self.bank.frozen[0, i]) for i, layer in enumerate(self.bank.layers)}

    def __repr__(self) -> str:
        tokens = sum(d.tokens for d in self.provenance.documents)
        return f"Memory({self.bank!r}, backbone={self.provenance.backbone!r}, tokens_read={tokens})"


def create(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    settings: InitSettings | None = None,
    *,
    rank: int | None = None,
    layers: Mapping[int, int] | Sequence[int] | None = None,
    start_id: int | None = None,
    name: str | None = None,
    tokenizer_sha256: str | None = None,
) -> Memory:
    """A fresh memory for `model`, initialised from the backbone's own weights and activations.

    It changes nothing until something is read into it. With the default strategy the activations of `ids` choose
    which of the backbone's basis vectors are cloned: give the first chunk of the text, so that the choice depends on
    nothing that is scored later.

        memory = locas.create(model, ids[:1024], rank=64)

    Args:
        model: a causal language model of a supported family.
        ids: [n] token ids.
        settings: strategy, rank, tau, seed; defaults where None.
        rank: slots for each layer, in place of `settings.rank`.
        layers: which layers get a memory, or a rank for each; None: all.
        start_id: the model's beginning-of-text token, where it expects one.
        name: what to call the backbone in the file; None: as it was loaded.
        tokenizer_sha256: see `Provenance`.

    Raises:
        ValueError: an unsupported model, or settings that do not fit it.
    """
    settings = settings or InitSettings()
    if rank is not None:
        settings = replace(settings, rank=rank)
    ids = torch.as_tensor(ids)
    chosen = layers if isinstance(layers, Mapping) or layers is None else list(layers)
    bank = create_bank(model, ids, settings, layers=chosen, start_id=start_id)
    provenance = Provenance(
        backbone=name or str(getattr(model, "name_or_path", "") or type(model).__name__),
        backbone_fingerprint=fingerprint(model),
        tokenizer_sha256=tokenizer_sha256,
        settings={"init": asdict(without_auto(settings, next(iter(find_sites(model, bank.layers).values()))))},
    )
    return Memory(bank, provenance, model)


def read(
    model: nn.Module,
    memory: Memory | None,
    ids: Tensor | Sequence[int],
    settings: ReadSettings | None = None,
    *,
    start_id: int | None = None,
    first_token: int = 0,
    learn: bool = True,
    name: str = "<ids>",
) -> Iterator[ChunkRecord]:
    """Reads a text chunk by chunk: scores each chunk with what the memory knows so far, then writes it.

        for record in locas.read(model, memory, ids):
            print(record.stop, record.nll.mean())

    Args:
        model: the backbone.
        memory: what is read into; None: score with the window's context only (truncated reading).
        ids: [n] token ids.
        settings: window, chunk, write rule; defaults where None.
        start_id: the token before the first one (BOS, or EOS where the model has no BOS), see `Reader`.
        first_token: tokens before it are context only.
        learn: False: score, but leave the memory as it is.
        name: of the text, for the memory's provenance.

    Yields:
        A `ChunkRecord` for each chunk. Stop early, and the memory holds what was read so far.

    Raises:
        ValueError: settings that do not fit the model, or a memory of another backbone.
    """
    if memory is not None:
        memory.check(model)
    settings = settings or ReadSettings()
    ids = torch.as_tensor(ids)
    bank = None if memory is None else memory.bank
    reader = Reader(model, bank, [ids], settings, start_id=start_id, first_token=first_token, learn=learn)
    try:
        for (record,) in reader:
            assert record is not None
            yield record
    finally:
        stop = min(reader.position, ids.numel())
        if memory is not None and learn and stop > first_token:
            record_reading(memory, ids[first_token:stop], settings, name=name)


def record_reading(
    memory: Memory, ids: Tensor, settings: ReadSettings, *, name: str, text_sha256: str | None = None
) -> None:
    """Notes in the memory's provenance that a text was read into it."""
    digest = hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()
    document = DocumentRead(name, ids.numel(), digest, text_sha256)
    old = memory.provenance
    memory.provenance = replace(
        old,
        documents=(*old.documents, document),
        settings={**old.settings, "read": asdict(settings)},
        library=__version__,
    )


def load(path: str | Path, model: nn.Module | None = None, *, tokenizer_sha256: str | None = None) -> Memory:
    """Loads a memory file; everything is checked before anything is used, and nothing is executed.

    Args:
        path: a file that `Memory.save` wrote.
        model: the backbone; its device and fingerprint are taken into account. None: check that on attaching.
        tokenizer_sha256: the tokenizer that is at hand (`Backbone.tokenizer_sha256`), checked where the file names one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a memory, damaged, of a newer format, or made with another backbone or tokenizer.
    """
    tensors, manifest = load_tensors(path, kind=FORMAT)
    bank, provenance = from_manifest(path, tensors, manifest)
    memory = Memory(bank, provenance)
    if model is not None:
        memory.check(model)
        memory.bank = bank.to(next(iter(check_fit(model, bank).values())).device)
    known = provenance.tokenizer_sha256
    if tokenizer_sha256 is not None and known is not None and known != tokenizer_sha256:
        raise ValueError(
            f"{path} was made with another tokenizer ({known[:12]}) than the one at hand ({tokenizer_sha256[:12]}), so "
            f"its token ids mean other words; load the tokenizer of {provenance.backbone!r}"
        )
    return memory


def from_manifest(path: str | Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> tuple[Bank, Provenance]:
    """Bank and provenance of a memory's tensors and manifest, checked completely.

    Raises:
        ValueError: they do not describe a memory, or not the same one; `path` is what the message calls them.
    """
    version = manifest.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has memory format {version!r}; this locas ({__version__}) reads {FORMAT_VERSION}. "
            "Update locas, or make the memory again. Nothing was loaded."
        )
    try:
        ranks = {_layer(name): _whole(rank) for name, rank in manifest["ranks"].items()}
        expected = expected_shapes(manifest["variant"], ranks, _whole(manifest["d_model"]))
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            name = wrong[0]
            raise ValueError(f"tensor {name!r} should be {expected.get(name)} and is {found.get(name)}")
        dtype = tensor_dtype(tensors, path)
        bank = Bank(manifest["variant"], manifest["activation"], manifest["d_model"], ranks, dtype=dtype)
        tau = {_layer(name): _number(t) for name, t in manifest["tau"].items()}
        if tau.keys() != ranks.keys():
            raise ValueError(f"tau is given for layers {sorted(tau)}, ranks for {sorted(ranks)}")
        bank.tau[0] = torch.tensor([tau[layer] for layer in bank.layers], dtype=torch.float64)
        if not bool(bank.tau.isfinite().all()):
            raise ValueError("tau is not finite")
        frozen = {_layer(name): _whole(n) for name, n in manifest.get("frozen", {}).items()}
        if any(not 0 <= n <= ranks[layer] for layer, n in frozen.items()):
            raise ValueError(f"{frozen} slots are frozen, of {ranks}")
        bank.frozen[0] = torch.tensor([frozen.get(layer, 0) for layer in bank.layers])
        provenance = Provenance(
            backbone=_text(manifest["backbone"]),
            backbone_fingerprint=_text(manifest["backbone_fingerprint"]),
            tokenizer_sha256=_text_or_none(manifest["tokenizer_sha256"]),
            documents=tuple(_document(d) for d in _list(manifest["documents"])),
            settings=_dict(manifest["settings"]),
            library=_text(manifest["library"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the manifest of {path} does not describe a memory: {what}. Nothing was loaded.") from error
    for layer in bank.layers:
        slots = bank.slots(layer)
        for name, part in (("gate", slots.g), ("key", slots.k), ("value", slots.v)):
            if part is not None:
                part[0].copy_(tensors[f"layers.{layer}.{name}"])
    return bank, provenance


def expected_shapes(variant: str, ranks: Mapping[int, int], d_model: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors in a memory's file."""
    names = ("gate", "key", "value") if variant == "glu" else ("key", "value")
    return {f"layers.{layer}.{name}": (rank, d_model) for layer, rank in ranks.items() for name in names}


def _document(value: object) -> DocumentRead:
    fields = _dict(value)
    document = DocumentRead(**fields)
    _text(document.name), _text(document.ids_sha256), _text_or_none(document.text_sha256)
    if _whole(document.tokens) < 0:
        raise ValueError(f"{document.name!r} has {document.tokens} tokens")
    return document


def _layer(name: str) -> int:
    layer = int(name)
    if str(layer) != name:
        raise ValueError(f"{name!r} is not the number of a layer")
    return layer


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object")
    return value
