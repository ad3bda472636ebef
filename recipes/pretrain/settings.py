"""The numbers of the recipe: what is trained, on how much, how fast. Every run saves those it used."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HOME = Path(".pretrain")  # ignored by git
DATA = HOME / "data"
RUNS = HOME / "runs"
END_OF_TEXT = "<|endoftext|>"  # token 0: stands before every book, so a text that begins with it reads as a new one
MODELS = ("tiny-glu", "tiny-mlp")


@dataclass(frozen=True)
class Preset:
    """Size of the twins and how they are trained; both twins get exactly the same.

    Attributes:
        name: the preset's.
        d_model: width.
        n_layers: layers.
        n_heads: attention heads.
        n_kv_heads: key and value heads, each shared by some of the attention heads.
        d_ff_glu: FFN width of tiny-glu; tiny-mlp's is half as much again, so that both FFNs have equally many weights.
        context: tokens in a training sequence.
        stable_context: what a sequence is cut to until the learning rate falls, where attention over all of it would
            cost too much (on the CPU a fifth of the time); divides `context`, None: not cut.
        tokens: tokens to train on, repeats counted.
        batch: sequences a step.
        micro_batch: sequences that go through the model at once; divides `batch`.
        lr: the highest learning rate, of all weights alike (see optimiser.py).
        warmup: share of the steps in which the learning rate rises to `lr`.
        decay: share of the steps, the last ones, in which it falls to zero.
        weight_decay: share of a weight lost per step and unit of learning rate; not of norms.
        grad_clip: the gradient's length is cut to this.
        log_every: steps between two lines of the log.
        valid_every: steps between two validations.
        valid_windows: sequences of each form of the validation text that are scored then.
        seed: of the weights and of the order of the sequences.
    """

    name: str = "gpu"
    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 4
    d_ff_glu: int = 1280
    context: int = 2048
    stable_context: int | None = None
    tokens: int = 400_000_000
    batch: int = 64
    micro_batch: int = 32
    lr: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    log_every: int = 20
    valid_every: int = 250
    valid_windows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}; choose one that does")
        if self.stable_context is not None and (self.stable_context < 1 or self.context % self.stable_context):
            raise ValueError(
                f"stable_context {self.stable_context} does not divide context {self.context}; choose one that does"
            )
        if self.d_ff_glu % 2:
            raise ValueError(
                f"d_ff_glu {self.d_ff_glu} is odd; tiny-mlp's width is half as much again, so make it even"
            )
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} heads must divide d_model {self.d_model}, and {self.n_kv_heads} key heads the heads"
            )
        if self.n_steps < 1:
            raise ValueError(f"{self.tokens} tokens are less than one step of {self.tokens_a_step}; raise --tokens")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are shares, together at most 1")

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.context

    @property
    def n_steps(self) -> int:
        return self.tokens // self.tokens_a_step

    @property
    def n_stable(self) -> int:
        """Steps before the learning rate begins to fall."""
        return self.n_steps - round(self.decay * self.n_steps)

    def context_at(self, step: int) -> int:
        """Tokens that a sequence of a step, counted from 0, is cut to."""
        return self.context if self.stable_context is None or step >= self.n_stable else self.stable_context

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def changed(self, **changes: Any) -> Preset:
        """With those changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


PRESETS = {
    "gpu": Preset(),
    "cpu": Preset(
        "cpu", d_model=192, n_layers=6, n_heads=3, n_kv_heads=3, d_ff_glu=512, stable_context=256, tokens=7_500_000,
        batch=2, micro_batch=1, decay=0.4, valid_every=150, valid_windows=8, log_every=10,
    ),
    "smoke": Preset(
        "smoke", d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff_glu=128, context=64, tokens=64 * 8 * 20, batch=8,
        micro_batch=4, valid_every=10, valid_windows=4, log_every=5,
    ),
}  # fmt: skip
