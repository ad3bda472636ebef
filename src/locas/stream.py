"""Reading: score each chunk, then learn from it (arXiv:2602.05085 sec. 5).

    reader = Reader(model, bank, [ids], ReadSettings(chunk=1024))
    for (record,) in reader:
        print(record.stop, record.nll.mean())

One forward pass gives the loss that is reported and the loss that is differentiated. Documents may be read side
by side, each into its own memory of a bank; every row is read as if it were alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locas.attach import attached, check_fit
from locas.bank import Bank
from locas.curvature import Curvature
from locas.forward import IGNORED, chunk_nll, device_of, find_head, frozen, possible_gradient
from locas.graphs import Graph, Stage, graphs_for
from locas.initialise import empty_slots, fill_slots, stepwise_rows
from locas.prefix import KeptPrefix, prefix_for
from locas.read_settings import ReadSettings
from locas.window import Layout, Window, check_documents
from locas.write import Writer

_SAMPLED = 64  # tokens of a chunk, at least, that curvature is gathered from, and
_SPARSE = 8  # one in so many, at most: what is lost is in docs/method.md

OnFailure = Literal["raise", "drop"]


@dataclass(frozen=True)
class ChunkRecord:
    """What reading one chunk of one document showed.

    Attributes:
        start: first token of the chunk.
        stop: one past its last token.
        nll: [stop - start] float32, each token's negative log-likelihood in nats before anything was learnt from
            it; NaN for a first token that nothing precedes.
        seconds: wall time of the chunk, scoring and writing, shared by all documents that are read side by side.
        grad_norm: Euclidean norm of the first step's gradient; NaN where nothing was learnt.
        row_norm: mean length of the memory's rows after the write; NaN without a memory.
        filled: slots filled step-wise (Locas-MLP).
        undone: True if a write was undone because a loss or gradient was not finite; from then on the step is
            `step_scale` times what was asked for.
        step_scale: see `undone`.
    """

    start: int
    stop: int
    nll: Tensor
    seconds: float
    grad_norm: float
    row_norm: float
    filled: int
    undone: bool
    step_scale: float


class Reader:
    """Reads documents side by side, each into its own memory; can be saved after any chunk and resumed.

    Args:
        model: a causal language model of a supported family.
        bank: as many memories as documents, or None to score without memory.
        documents: [n] token ids each, on any device.
        settings: see `ReadSettings`.
        start_id: the token before a document's first one (BOS, or EOS as is usual where a model has no BOS); None:
            the first token then is not scored.
        first_token: tokens before it are context only, neither scored nor learnt.
        learn: False: score only.
        on_failure: what becomes of a document whose loss is not finite although its memory's last write was undone:
            "raise" ends the reading of all, "drop" that of this one; it is then in `failed`.

    Attributes:
        failed: {document: first token of the chunk whose loss was not finite}; their memories are not to be used.

    Raises:
        ValueError: sizes that do not fit together, an empty document, ids outside the vocabulary, or a bank that
            does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank | None,
        documents: Sequence[Tensor],
        settings: ReadSettings,
        *,
        start_id: int | None = None,
        first_token: int = 0,
        learn: bool = True,
        on_failure: OnFailure = "raise",
    ) -> None:
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure {on_failure!r} is not one of {', '.join(get_args(OnFailure))}")
        self.window_tokens, self.chunk_tokens = settings.sizes(model)
        check_documents(model, documents, bank, first_token, start_id)
        self.model = model
        self.bank = bank
        self.sites = check_fit(model, bank) if bank is not None else {}
        self.settings = settings
        self.start_id = start_id
        self.device = device_of(model)
        self.documents = [d.to("cpu", torch.int64) for d in documents]
        self.position = self._first_token = first_token
        self.on_failure = on_failure
        self.failed: dict[int, int] = {}
        learns = bank is not None and learn
        self.writer = Writer(bank, settings.write) if learns and bank is not None else None
        self._curvature: Curvature | None = None
        if bank is not None and learns and settings.write.curved:
            # Of a full chunk, so that nothing depends on what is read beside it.
            stride = max(1, min(_SPARSE, self.chunk_tokens // _SAMPLED))
            self._curvature = Curvature(bank, self.sites, stride)
        self._head = find_head(model)
        self._attention_gradient = possible_gradient(settings.attention_gradient, model) if learns else "full"
        everywhere = settings.start_in_every_window is not False
        self._layout = Layout(self.window_tokens, self.chunk_tokens, start_id, everywhere)
        self._prefix = prefix_for(model, self.documents, self._layout, settings)
        together = bank is None or bank.device == self.device
        self._graphs = graphs_for(model, self.device) if together else None
        self._replayed: Graph | None = None  # the last score's
        self._around = ExitStack()  # of a chunk, see `_ready`
        self._alive: list[object] | None = None
        self._replays = False
        self._scored = False  # in this chunk: what holds gradients then belongs to another stream than a capture's
        self._last_share: tuple[Any, Tensor] = (None, torch.empty(0))
        self._nobody = torch.zeros(0, dtype=torch.bool) if bank is None else bank.rows.new_zeros(bank.size).bool()
        self._to_fill = self._may_fill()

    # ---------------------------------------------------------------- reading

    @property
    def reuses(self) -> bool:
        """Whether the context is kept from chunk to chunk."""
        return isinstance(self._prefix, KeptPrefix)

    @property
    def done(self) -> bool:
        """Whether every document is read to its end, or dropped."""
        return not self._unread()

    def _unread(self) -> list[int]:
        """The documents of which there is something left to read."""
        return [i for i, d in enumerate(self.documents) if d.numel() > self.position and i not in self.failed]

    def __iter__(self) -> Iterator[list[ChunkRecord | None]]:
        while not self.done:
            yield self.next_chunk()

    def next_chunk(self) -> list[ChunkRecord | None]:
        """Scores the next chunk of every document and learns from it; None for documents that have ended
        or that are dropped, now or earlier.

        Raises:
            FloatingPointError: the loss is not finite although the memory's last write was undone (unless such
                documents are dropped).
            ValueError: there is nothing left to read.
        """
        if self.done:
            raise ValueError("every document is read to its end")
        began = time.perf_counter()
        window = self.window()
        with ExitStack() as self._around, torch.set_grad_enabled(self.writer is not None):
            self._alive, self._replayed, self._scored = None, None, False
            self._replays = self._graphs is not None and not self._graphs.seen_by_others()
            if self.bank is None:
                nll, losses = self._score(window)
                self._check_finite(window, losses)
                written = None
            else:
                nll, *written = self._score_and_write(window)
            self._prefix.keep()
            self._prefix.drop(self.failed)
        self.position = window.start + self.chunk_tokens
        return self._records(window, nll, written, time.perf_counter() - began)

    def _ready(self, window: Window) -> list[object]:
        """Before the model is called: until the chunk is over it is frozen, and the memory attached. Returns what the
        passes use besides their inputs."""
        if self._alive is not None:
            return self._alive
        enter, bank = self._around.enter_context, self.bank
        self._alive = [enter(frozen(self.model))]
        if bank is not None:
            if self.writer is not None:
                bank.requires_grad_()
                self._around.callback(bank.requires_grad_, False)
            index = None if bank.size == 1 else torch.tensor(window.rows)
            self._alive.append(enter(attached(self.model, bank, index)))
            if self._curvature is not None:
                self._alive.append(enter(self._curvature.watching(window.rows)))
        return self._alive

    def window(self) -> Window:
        """The next chunk as the model will get it; baselines learn from it in their own way."""
        return self._layout.window(self.documents, self._unread(), self.position, self.device)

    def _score(self, window: Window) -> tuple[Tensor, Tensor]:
        """Each target's loss [live, chunk], and each document's mean loss [live]."""
        if window.targets.shape[1] == 0:
            return window.targets.new_zeros(window.targets.shape, dtype=torch.float32), torch.zeros(len(window.rows))
        before, inputs = window.inputs.tensor_split([window.prefix_tokens], dim=1)

        def ready() -> object:
            return self._ready(window)

        def ready_to_capture() -> object:
            if self.bank is not None:
                self.bank.forget()  # what is kept for reading would be taken for what never changes
            if self.writer is not None:
                self.writer.pin()
            return ready()

        given = [inputs, window.targets, *self._prefix.given(window.rows, before, inputs.shape[1], ready)]
        self._replayed = None
        if self._graphs is not None and self._replays:
            share = given[:0] if self.writer is None else [self._share(window)]
            capture = None if self._scored else ready_to_capture
            self._replayed = self._graphs.run(tuple(window.rows), [*share, *given], self._stages(), capture)
            self._scored = True
        if self._replayed is not None:
            nll, losses, *left = self._replayed.made
            self._prefix.open(left)
            return nll.clone(), losses
        ready()
        nll, losses, *left = self._pass(*given)
        self._prefix.open(left)
        return nll, losses

    def _stages(self) -> list[Sequence[Stage]]:
        """Scoring, the gradient and the write, as they are captured."""
        writer = self.writer
        if writer is None:
            return [[lambda inputs, _: self._pass(*inputs)]]

        def write(renew: bool) -> Stage:
            return lambda inputs, made: writer.write(made[0], inputs[0], made[1], renew)

        stages: list[Sequence[Stage]] = [
            [lambda inputs, _: self._pass(*inputs[1:])],
            [lambda inputs, made: self._backward(made[1], inputs[0])],
        ]
        if writer.bank.frozen.any():
            return stages
        return [*stages, [write(False), write(True)] if self._curvature is not None else [write(False)]]

    def _pass(self, inputs: Tensor, targets: Tensor, *given: Tensor) -> list[Tensor]:
        """Each target's loss, each document's mean loss, and what the prefix may keep."""
        context = self._prefix.context(*given)
        how = self._attention_gradient, self.settings.recompute_ffn
        nll = chunk_nll(self.model, inputs, targets, context, self._head, *how)
        counts = (targets != IGNORED).sum(dim=1).clamp(min=1)
        return [nll, nll.sum(dim=1) / counts, *self._prefix.left(context)]

    def _score_and_write(self, window: Window) -> tuple[Tensor, Tensor, list[int], Tensor]:
        """The targets' losses; of the bank's memories the first gradient's norm, NaN where there was none; how many
        slots each live document filled; and, [bank] bool, whose write was undone."""
        assert self.bank is not None
        nll, losses, undone = self._score_finite(window)
        scored, filled = nll.detach(), [0] * len(window.rows)
        whole = self.settings.steps == 1 and not self._to_fill and not self.bank.frozen.any()
        if self._replayed is not None and self.writer is not None and whole and undone is self._nobody:
            self.writer.pin()
            grad, _ = self._replayed.go_on()
            norms, undone = _norms(grad), self._replayed.go_on(int(self._renews(window)))
            self.bank.forget()
            return scored, norms, filled, undone
        norms = self.bank.tau.new_full((self.bank.size,), torch.nan)
        if self.writer is None or window.targets.shape[1] == 0:
            return scored, norms, filled, undone
        live, filling = self._live(window), self._filling(window)
        for step in range(self.settings.steps):
            # Filling slots stands for the first gradient step, for the memories that have room.
            active = live & ~filling if step == 0 else live
            if active.any():
                if step > 0:
                    _, losses, bad = self._score_finite(window)
                    undone = undone | bad
                grad, curvature = self._gradient(window, losses)
                # The first gradient step is number 1 for those that filled slots, else number 0.
                norms = torch.where(active & (filling == step), _norms(grad), norms)
                undone = undone | self.writer.write(grad, active * self._share(window), curvature, self._renews(window))
            if step == 0 and filling.any():
                filled, bad = self._fill(window, scored, filling)
                undone = undone | bad
        return scored, norms, filled, undone

    def _score_finite(self, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """Scores; where a loss is not finite, takes those memories' last write back and scores once more. With the
        memories that this happened to, [bank]."""
        nll, losses = self._score(window)
        if all(math.isfinite(loss) for loss in losses.tolist()):
            return nll, losses, self._nobody
        bad = self._scatter(window, ~losses.detach().isfinite())
        bad[list(self.failed)] = False  # dropped earlier in this chunk
        if bad.any():
            kept = self._prefix.state()
            if self.writer is not None:
                self.writer.undo(bad)
                self._prefix.forget()
                nll, losses = self._score(window)
            self._check_finite(window, losses)
            if kept and all(row in self.failed for row in bad.nonzero()[:, 0].tolist()):
                self._prefix.load_state(kept)  # the others go on as if nothing had happened
                nll, losses = self._score(window)
        return nll, losses, bad

    def _check_finite(self, window: Window, losses: Tensor) -> None:
        """Documents whose loss is not finite are dropped, or end the reading."""
        bad = [row for row, loss in zip(window.rows, losses.tolist(), strict=True) if not math.isfinite(loss)]
        if self.on_failure == "drop":
            # They stay in this chunk's batch, where no row touches another, and write nothing.
            self.failed = dict.fromkeys(bad, window.start) | self.failed
        elif bad:
            raise FloatingPointError(
                f"the loss on tokens {window.start}..{max(window.stops)} of document(s) {bad} is not finite, and not "
                "because of the memory's last write; check the backbone in its dtype on this text (try float32)"
            )

    def _gradient(self, window: Window, losses: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The gradient, and where it is asked for the curvature with its tokens (see `Writer.write`)."""
        if self._replayed is not None:
            return self._replayed.go_on()
        return self._backward(losses, self._share(window))

    def _backward(self, losses: Tensor, share: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        assert self.bank is not None
        assert self.bank.grad is not None
        self.bank.grad.zero_()
        with self._curvature.gathering() if self._curvature is not None else nullcontext():
            losses.sum().backward(inputs=self.bank.leaves())
        return self.bank.grad, None if self._curvature is None else self._curvature.take(share * self.chunk_tokens)

    def _renews(self, window: Window) -> bool:
        """Whether this chunk's writes make the metric anew."""
        number = (window.start - self._first_token) // self.chunk_tokens
        return self._curvature is not None and self.settings.write.renews(number)

    def _filling(self, window: Window) -> Tensor:
        """[bank] the memories whose empty slots this chunk fills."""
        assert self.bank is not None
        room = empty_slots(self.bank) > 0 if self._to_fill else torch.zeros_like(self._live(window))
        self._to_fill = bool(room.any())
        return room & self._live(window)

    def _fill(self, window: Window, scored: Tensor, filling: Tensor) -> tuple[list[int], Tensor]:
        """Puts one slot a token into empty slots: how many for each live document, and, [bank], where that was
        undone because something was not finite."""
        assert self.bank is not None
        assert self.writer is not None
        self._ready(window)  # what is replayed needs no model, this does
        self.writer.remember(filling)
        keys, values = stepwise_rows(self.model, self.sites, window.inputs, window.prefix_tokens, window.targets)
        eps, filled = self.settings.fill_eps, [0] * len(window.rows)
        for i, row in enumerate(window.rows):
            if filling[row]:
                k = {layer: key[i] for layer, key in keys.items()}
                v = {layer: value[i] * eps for layer, value in values.items()}
                filled[i] = fill_slots(self.bank, row, k, v, scored[i], window.targets[i])
        bad = filling & ~self.bank.rows.isfinite().flatten(1).all(dim=1)
        if bad.any():
            self.writer.undo(bad)
            filled = [0 if bad[row] else n for row, n in zip(window.rows, filled, strict=True)]
        return filled, bad

    def _share(self, window: Window) -> Tensor:
        """[bank] how much of a full chunk each document's stretch is, by which its step is scaled."""
        writer = self.writer
        assert writer is not None
        counts = [max(0, stop - window.first_target) for stop in window.stops]
        key = (tuple(window.rows), tuple(counts))
        if self._last_share[0] != key:
            share = torch.zeros(writer.bank.size, dtype=torch.float64)
            share[window.rows] = torch.tensor(counts, dtype=torch.float64) / self.chunk_tokens
            self._last_share = (key, share.to(writer.bank.device))
        return self._last_share[1]

    def _live(self, window: Window) -> Tensor:
        """[bank] the memories that have something to learn from this chunk."""
        live = self._scatter(window, (window.targets != IGNORED).any(dim=1))
        live[list(self.failed)] = False
        return live

    def _scatter(self, window: Window, flags: Tensor) -> Tensor:
        """[live] flags as [bank] flags, False for documents that have ended."""
        assert self.bank is not None
        out = torch.zeros(self.bank.size, dtype=torch.bool, device=self.bank.device)
        out[window.rows] = flags.to(self.bank.device)
        return out

    def _records(self, window: Window, nll: Tensor, written: Any, seconds: float) -> list[ChunkRecord | None]:
        """written: what `_score_and_write` returned besides the losses; None without a memory."""
        records: list[ChunkRecord | None] = [None] * len(self.documents)
        scored, bank, filled = nll.float().cpu(), self.bank, [0] * len(window.rows)
        numbers = [[math.nan, math.nan, 0.0, 1.0]] * len(self.documents)
        if bank is not None:
            norms, filled, undone = written
            scale = torch.ones_like(norms) if self.writer is None else self.writer.scale
            each = (norms, bank.rows.norm(dim=-1).mean(dim=-1), undone, scale)
            numbers = torch.stack([t.to(torch.float64) for t in each], dim=1).tolist()
        for i, (row, stop) in enumerate(zip(window.rows, window.stops, strict=True)):
            if row in self.failed:
                continue
            scores = torch.full((stop - window.start,), torch.nan)
            scores[window.first_target - window.start :] = scored[i, : max(0, stop - window.first_target)]
            grad_norm, row_norm, was_undone, step_scale = numbers[row]
            records[row] = ChunkRecord(
                start=window.start,
                stop=stop,
                nll=scores,
                seconds=seconds,
                grad_norm=grad_norm,
                row_norm=row_norm,
                filled=filled[i],
                undone=bool(was_undone),
                step_scale=step_scale,
            )
        return records

    def tensors(self) -> list[Tensor]:
        """What stays from chunk to chunk, besides model and documents: the memory, what the write rule keeps, the copy
        for undoing the last write included, and the context where it is kept. As they lie, not copied."""
        bank = [] if self.bank is None else [self.bank.rows, self.bank.tau]
        writer = {} if self.writer is None else self.writer.state()
        return [*bank, *writer.values(), *self._prefix.tensors()]

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, besides model, documents and settings."""
        state = {"position": torch.tensor(self.position)}
        if self.on_failure == "drop":
            state["failed"] = torch.tensor([self.failed.get(i, -1) for i in range(len(self.documents))])
        if self.bank is not None:
            state |= {"rows": self.bank.rows, "tau": self.bank.tau}
        if self.writer is not None:
            state |= {f"writer.{name}": t for name, t in self.writer.state().items()}
        state |= {f"prefix.{name}": t for name, t in self._prefix.state().items()}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken: the rest of the run is bit-identical to never having stopped.

        Raises:
            ValueError: the state is of another layout; nothing was changed.
        """
        self._check_state(state)
        self._prefix.load_state(_part(state, "prefix."))
        if self.bank is not None:
            self.bank.rows.copy_(state["rows"])
            self.bank.tau.copy_(state["tau"])
        if self.writer is not None:
            self.writer.load_state(_part(state, "writer."))
        self.position = int(state["position"])
        if self.on_failure == "drop":
            self.failed = {i: start for i, start in enumerate(state["failed"].tolist()) if start >= 0}
        self._to_fill = self._may_fill()

    def _may_fill(self) -> bool:
        return self.writer is not None and self.writer.bank.variant == "mlp"

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError unless `state` has what `load_state` takes, and no more of a writer."""
        optional = (".before.", "prefix.")
        needed = {name: t for name, t in self.state().items() if not any(part in name for part in optional)}
        extra = [name for name in state if name.startswith("writer.") and ".before." not in name]
        before: dict[str, Tensor] = {}
        if self.writer is not None and "writer.before.0" in state:
            before = {f"writer.before.{i}": t for i, t in enumerate(self.writer.live())}
        for name in (*needed, *extra, *before):
            want, have = (
                None if t is None else (tuple(t.shape), t.dtype) for t in ((needed | before).get(name), state.get(name))
            )
            if want != have:
                raise ValueError(
                    f"this state holds {name} of {have}, the reader needs {want}; resume with the settings that the "
                    "run was started with"
                )


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin so, without that beginning."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _norms(grad: Tensor) -> Tensor:
    return grad.flatten(1).norm(dim=1)
