"""`locas memorize`: read texts into a memory file."""

from __future__ import annotations

import glob
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import tyro
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from locas.bank import Bank
from locas.cli.common import (
    BackboneOptions,
    Maybe,
    OutputOptions,
    TextOptions,
    UserError,
    all_frozen,
    brief_name,
    check_folder,
    comparison,
    err,
    out,
    percent,
    print_json,
    short,
)
from locas.cycle import CycleRun, check_cycle
from locas.initialise import InitSettings
from locas.memory import load
from locas.run import Progress as RunProgress
from locas.run import Run
from locas.run_memories import check_output
from locas.run_settings import PRESETS, RunSettings, layer_spans
from locas.stream import ReadSettings

Preset = Literal["default", "paper"]


@dataclass(frozen=True)
class Memorize:
    """Read texts into a memory file.

    Each chunk of the text is scored first, then learnt. Ctrl-C stops after the current chunk and says how to go on;
    so does a crash or a kill: run the same command with --resume.

        locas memorize book.txt -o book.safetensors --compare
        locas memorize src/ -o code.safetensors --model Qwen/Qwen3-0.6B-Base
        cat notes.md | locas memorize - -o notes.safetensors --memory book.safetensors
        locas memorize b.txt -o ab.safetensors --memory a.safetensors --grow 32 --freeze
        locas memorize a.txt b.txt c.txt -o memories/ --batch 16
        locas memorize book.txt -o book.safetensors --variant mlp --rank 512 --cycle 256
    """

    text: TextOptions
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """The memory file to write (.safetensors); with --batch, the folder for the memory files."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    memory: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    """Go on with this memory; its rank, layers and initialisation stay as they are."""
    grow: int = 0
    """With --memory: add so many slots to each layer, made from the first text (--init, --seed)."""
    freeze: bool = False
    """With --memory: the slots that it has stay as they are, to the last bit; add others with --grow."""
    thaw: bool = False
    """With --memory: slots that are frozen in it learn again."""
    cycle: int = 0
    """Step-wise Locas-MLP: NL-SVD leaves so many of --rank full slots (paper: half), filling goes on; 0: no cycle."""
    compare: bool = False
    """Also read every text without memory, and show the difference (costs about the time of reading)."""
    batch: Maybe[int] = None
    """Read each text into a memory of its own, so many side by side; -o is then a folder."""
    resume: bool = False
    """Go on where a stopped run of the same settings left off; start afresh where there is none."""
    save_every: float = 30.0
    """Seconds between two states that a run can be resumed from; 0: after every chunk."""
    preset: Preset = "default"
    """Settings that other flags change. default: our sweeps'; paper: output scale and rate as published, AdamW, every
    window recomputed."""
    layers: str = "all"
    """Layers that get a memory: all, upper-half, or numbers such as 0,3-5."""
    init_tokens: Maybe[int] = None
    """Tokens that choose the basis; not given: the first chunk. With more, it depends on text not scored yet."""
    initialise: InitSettings = field(default_factory=InitSettings)
    read: ReadSettings = field(default_factory=ReadSettings)
    show: OutputOptions = field(default_factory=OutputOptions)

    def settings(self) -> RunSettings:
        """What the run's result depends on."""
        return RunSettings(
            init=self.initialise,
            read=self.read,
            layers=self.layers,
            init_tokens=self.init_tokens,
            start_from=self.memory,
            grow=self.grow,
            freeze=self.freeze,
            thaw=self.thaw,
            cycle=self.cycle,
            compare=self.compare,
        )

    def run(self) -> int:
        """0; 1 if a text of a batch had to be left out; 130 if the user stopped it."""
        if self.save_every < 0:
            raise UserError(f"--save-every is a number of seconds, 0 or more; got {self.save_every}")
        self._check_batch()
        settings = self.settings()
        layer_spans(self.layers)
        if self.init_tokens is not None and self.init_tokens < 1:
            raise UserError(f"init_tokens must be 1 or more; got {self.init_tokens}")
        self._check_memory()
        if self.batch is None:
            check_output(Path(self.output))  # before a model is loaded and a long text tokenized
        else:
            check_folder(self.output)
        documents = self.text.collect()
        backbone = self.backbone.load()
        texts = self.text.tokenize(documents, backbone)
        if self.cycle:
            run: Run = CycleRun(backbone, texts, self.output, settings)
        else:
            run = Run(backbone, texts, self.output, settings, self.batch)
        self._announce(run)
        if not drive(run, self.save_every):
            return self._stopped(run)
        run.finish()
        results = run.results()
        if self.show.json:
            print_json(results)
        elif self.batch is None:
            self._tell_one(run, results)
        else:
            _tell_each(run, results)
        for each in results.get("failed", []):
            _say(f"{each['name']} was left out: {each['error']}", style="bold red")
        if run.undone:
            err.print(f"{run.undone} writes were undone because a loss or gradient was not finite; the step was halved")
        return 1 if results.get("failed") else 0

    def _check_batch(self) -> None:
        given = {"--memory": self.memory is not None, "--grow": self.grow != 0, "--freeze": self.freeze}
        given |= {"--thaw": self.thaw, "--cycle": self.cycle != 0}
        refused = [name for name, is_given in (given | {"--compare": self.compare}).items() if is_given]
        if self.batch is not None and self.batch < 1:
            raise UserError(f"a batch has 1 text or more side by side; got {self.batch}")
        if self.batch is not None and refused:
            raise UserError(
                f"{', '.join(refused)} and --batch do not go together: each text of a batch gets a fresh memory, and "
                "`locas score TEXT --memory FILE` compares afterwards"
            )

    def _check_cycle(self, bank: Bank | None) -> None:
        """What of the cycle can be known without a backbone. bank: of --memory."""
        if not self.cycle:
            return
        if bank is not None:
            if not self.grow and not self.thaw:
                check_cycle(bank, self.cycle)
        elif self.initialise.variant == "glu":
            raise UserError("the expansion-compression cycle is for Locas-MLP; leave --variant glu or --cycle out")
        elif self.cycle >= (rank := self.initialise.rank):
            raise UserError(
                f"compressing {rank} slots (the memory's capacity) to {self.cycle} leaves no room; use fewer"
            )

    def _check_memory(self) -> None:
        """What a memory that exists has already cannot be chosen again, unless the same is said of it."""
        bank = None if self.memory is None else load(self.memory).bank
        self._check_cycle(bank)
        if bank is None:
            return
        fresh, made = PRESETS[self.preset].init, self.initialise
        has: dict[str, Any] = {"variant": bank.variant, "activation": bank.activation}
        has |= {"rank": made.rank} if {*bank.ranks.values()} == {made.rank} else {}
        chosen = [f.name for f in fields(InitSettings) if getattr(made, f.name) != getattr(fresh, f.name)]
        chosen = [name for name in chosen if getattr(made, name) != has.get(name)]
        chosen = [name for name in chosen if not (self.grow and name in ("init", "seed"))]
        chosen += [name for name in ("layers", "init_tokens") if getattr(self, name) != getattr(Memorize, name)]
        if chosen:
            flags = ", ".join("--" + name.replace("_", "-") for name in chosen)
            raise UserError(
                f"{flags} and --memory do not go together: rank, layers and initialisation of {self.memory} stay as "
                "they are; leave it out, or add slots with --grow (made as --init and --seed say)"
            )
        if not self.grow and (self.freeze or (not self.thaw and all_frozen(bank))):
            raise UserError(
                f"every slot of {self.memory} is frozen: nothing can be learnt; add slots (--grow 32) or --thaw it"
            )

    def _tell_one(self, run: Run, results: dict[str, Any]) -> None:
        out.print(comparison(results))
        n, n_backbone = results["memory_parameters"], results["backbone_parameters"]
        out.print(
            f"\n[bold]{escape(str(run.output))}[/bold]: {n:,} parameters ({100 * n / n_backbone:.2f}% of the "
            f"backbone's), {run.output.stat().st_size / 2**20:.1f} MiB",
            soft_wrap=True,
        )
        if len(run.texts) > 1:
            out.print(f"{len(run.texts)} texts, {run.total_tokens:,} tokens")
        model = f" --model {short(self.backbone.model)}" if self.backbone.model else ""
        out.print(f"try: locas chat --memory {short(run.output)}{model}", style="dim", soft_wrap=True, markup=False)

    def _announce(self, run: Run) -> None:
        if self.resume and run.resume():
            _say(f"going on at token {run.tokens:,} of {run.total_tokens:,} ({run.state_path})")
            return
        if self.resume:
            _say("no stopped run of these settings here: starting afresh")
        elif run.state_path.exists():
            _say(
                f"a stopped run of these settings is in {run.state_path} and will be replaced; "
                "stop now and add --resume to go on with it"
            )
        name = glob.escape(run.state_path.name.removesuffix(f".{run.key[:8]}.partial"))
        for other in run.state_path.parent.glob(f"{name}.*.partial"):
            if other == run.state_path:
                continue
            _say(f"a stopped run of other settings is kept in {other}", style="dim")

    def _stopped(self, run: Run) -> int:
        run.save_state()
        command = "locas " + " ".join(short(a) for a in sys.argv[1:])
        command += "" if self.resume else " --resume"
        _say(f"\nstopped at token {run.tokens:,} of {run.total_tokens:,}; nothing is lost. Go on with:\n  {command}")
        if self.show.json:
            print_json({"stopped": True, "tokens": run.tokens, "total_tokens": run.total_tokens})
        return 130


def without_defaults(args: list[str], defaults: Memorize) -> list[str]:
    """Arguments without flags that say what is so anyway: where --no-reuse is offered, --reuse is no mistake."""
    on = {
        field.name: value
        for settings in (defaults.read, defaults.read.write)
        for field in fields(settings)
        if isinstance(value := getattr(settings, field.name), bool)
    }
    said = {("--" if value else "--no-") + name.replace("_", "-") for name, value in on.items()}
    return [arg for arg in args if arg not in said]


def memorize_defaults(args: list[str]) -> Memorize:
    """The defaults that --preset names, so that other flags can change them.

    Raises:
        UserError: no such preset.
    """
    name = "default"
    for i, arg in enumerate(args):
        if arg == "--preset" and i + 1 < len(args):
            name = args[i + 1]
        elif arg.startswith("--preset="):
            name = arg.partition("=")[2]
    if name not in PRESETS:
        raise UserError(f"--preset {name!r} is not one of {', '.join(get_args(Preset))}")
    chosen = PRESETS[name]
    missing: Any = tyro.MISSING
    return Memorize(
        text=TextOptions(paths=missing),
        output=missing,
        preset=cast(Preset, name),
        initialise=chosen.init,
        read=chosen.read,
    )


def _say(text: str, style: str | None = None) -> None:
    """A message as it is: paths and commands are neither wrapped nor taken for markup."""
    err.print(text, style=style, soft_wrap=True, markup=False)


def _tell_each(run: Run, results: dict[str, Any]) -> None:
    documents = results["documents"]
    if documents:
        out.print(memories(documents))
    n = len(documents)
    out.print(
        f"\n[bold]{n}[/bold] {'memory' if n == 1 else 'memories'} of {results['memory_parameters']:,} parameters, "
        f"{results['tokens']:,} tokens in {results['seconds']:.1f} s"
    )


def memories(documents: list[dict[str, Any]]) -> Table:
    """A table of the memories that a batch leaves."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory", overflow="fold")
    for name in ("perplexity", "bits per byte", "tokens"):
        table.add_column(name, justify="right")
    for each in documents:
        figures = f"{each['perplexity']:.2f}", f"{each['bits_per_byte']:.4f}", f"{each['tokens']:,}"
        table.add_row(escape(each["memory"]), *figures)
    return table


# -------------------------------------------------------------------- progress


def drive(run: Run, save_every: float) -> bool:
    """Runs to the end (True), or to the chunk in which the user asks to stop (False), showing where it stands."""
    saved = time.monotonic()
    with _stop_requests() as asked, _bar(run) as show:
        for progress in run:
            show(progress)
            if asked():
                return False
            if time.monotonic() - saved >= save_every:
                run.save_state()
                saved = time.monotonic()
    return True


@contextmanager
def _stop_requests() -> Iterator[Any]:
    """Turns the first Ctrl-C (or SIGTERM) into a request that is seen after the chunk; a second one breaks off."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        err.print("stopping after this chunk (once more to break off at once) ...")

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _bar(run: Run) -> Iterator[Any]:
    """A live bar on a terminal, now and then a line elsewhere."""
    if not err.is_terminal:
        yield _Lines(run)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("reading", total=run.total_tokens, completed=run.tokens, figures="")
        speed = _Speed(run.tokens)

        def show(progress: RunProgress) -> None:
            name = run.texts[progress.document].name
            which = f"{progress.document + 1}/{len(run.texts)} " if len(run.texts) > 1 else ""
            bar.update(
                task,
                description=which + escape(brief_name(name)),
                completed=progress.tokens,
                figures=f"{speed(progress.tokens):,.0f} tok/s  {_figures(progress)}",
            )

        yield show


class _Lines:
    """One line of progress for each tenth of the run, for logs."""

    def __init__(self, run: Run) -> None:
        self.total, self.speed = run.total_tokens, _Speed(run.tokens)
        self.next = run.tokens + self.total / 10

    def __call__(self, progress: RunProgress) -> None:
        if progress.tokens < self.next and progress.tokens < self.total:
            return
        self.next = progress.tokens + self.total / 10
        speed = self.speed(progress.tokens)
        left = (self.total - progress.tokens) / speed if speed else 0.0
        err.print(
            f"{progress.tokens:,}/{self.total:,} tokens, {speed:,.0f} tok/s, {left:.0f} s left, {_figures(progress)}",
            soft_wrap=True,
        )


class _Speed:
    """Tokens a second since the start."""

    def __init__(self, tokens: int) -> None:
        self.first, self.began = tokens, time.monotonic()

    def __call__(self, tokens: int) -> float:
        return (tokens - self.first) / max(1e-9, time.monotonic() - self.began)


def _figures(progress: RunProgress) -> str:
    figures = f"ppl {progress.score.perplexity:.2f}"
    if progress.baseline is not None:
        plain = progress.baseline.perplexity
        figures += f" (without memory {plain:.2f}, {percent(progress.score.perplexity, plain)})"
    if progress.record.step_scale < 1:
        figures += f"  step x{progress.record.step_scale:g}"
    return figures
