"""Kill `locas memorize` again and again, resume it each time, and see that the memory is the same to the last bit.

    python recipes/kill_resume.py                    # 200 kills on a generated text, with the built-in backbone
    python recipes/kill_resume.py --kills 6
    python recipes/kill_resume.py --text book.txt --model ../shared/models/foreign/stories260k --json

One run is read undisturbed. Then runs of the same settings are begun, each is stopped by SIGKILL at random moments and
gone on with (--resume --save-every 0) until it completes, and the next begins, until there were enough kills. After
every kill all memory and state files must be readable, and every memory that is completed must be the undisturbed
one's equal, byte for byte. Moments are drawn from a seed, and lie a random time after something that was observed: the
start of the process, a number of states that it saved, or the beginning of the final save.

With --fork every run is a fork of this process, which has done the imports: a real process, killed by a real SIGKILL,
that starts in a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import locas
from locas import cli
from locas.run_memories import OneMemory
from locas.store import load_tensors, write_atomically

PHASES = {"before the first state": 0.35, "between states": 0.45, "final save": 0.2}  # what is aimed at, and how often
POLL_S = 0.001
TIMEOUT_S = 300.0


@dataclass
class Target:
    """One run that is to be killed and gone on with."""

    command: list[str]
    output: Path
    fork: bool = False
    kills: int = 0

    def saved(self) -> tuple[int | None, ...]:
        """When the memory file and the file that becomes it were last written, None where there is none."""
        return tuple(modified(p) for p in (self.output, self.output.with_name(f".{self.output.name}.tmp")))

    def state(self) -> int | None:
        """When the state file was last replaced, None where there is none."""
        return next((modified(p) for p in self.output.parent.glob(f"{self.output.name}.*.partial")), None)


def modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    files_checked: int = 0
    seconds: list[float] = field(default_factory=list)


def main() -> int:
    args = parse()
    torch.set_num_threads(1)  # a fork must find no other thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.monotonic()
    choose, tally = random.Random(args.seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        text = args.text or generated(Path(folder, "text.txt"), args.sentences, args.seed)
        reference, startup_s = undisturbed(args, text, Path(folder))
        say(
            f"an undisturbed run takes {time.monotonic() - began:.1f} s, {startup_s:.1f} s of it before its first state"
        )
        while tally.kills.total() < args.kills:
            target = new_target(args, text, Path(folder, f"{tally.runs}.safetensors"))
            while not one_process(target, choose, startup_s, args.kills, tally):
                pass
            if target.output.read_bytes() != reference:
                raise SystemExit(f"run {tally.runs}, killed {target.kills} times, left another memory than undisturbed")
            tally.runs += 1
            target.output.unlink()
            say(f"run {tally.runs}: killed {target.kills} times, memory byte-identical ({tally.kills.total()} kills)")
            leftovers = [p.name for p in Path(folder).iterdir() if p.suffix == ".partial"]
            if leftovers:
                raise SystemExit(f"state files are left behind: {leftovers}")
            result = report(args, tally, time.monotonic() - began)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result) if args.json else f"{tally.kills.total()} kills in {tally.runs} runs: {dict(tally.kills)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a text to read (default: a generated one)")
    parser.add_argument("--sentences", type=int, default=80, help="of the generated text, about 9 tokens each")
    parser.add_argument("--model", help="a backbone (default: the built-in one)")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--chunk", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=720)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "kill_resume.json")
    parser.add_argument(
        "--fork", action="store_true", help="fork runs off this process instead of starting Python anew"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills must be 1 or more; got {args.kills}")
    return args


def generated(path: Path, sentences: int, seed: int) -> Path:
    """A text that is the same for the same seed."""
    choose = random.Random(seed)
    names, verbs = ("Ahab", "Ishmael", "Queequeg", "Starbuck", "Stubb"), ("watched", "followed", "feared", "left")
    things = ("the white whale", "the old ship", "a long harpoon", "the grey sea", "his own shadow")
    lines = [f"{choose.choice(names)} {choose.choice(verbs)} {choose.choice(things)}." for _ in range(sentences)]
    path.write_text(" ".join(lines) + "\n")
    return path


def new_target(args: argparse.Namespace, text: Path, output: Path) -> Target:
    settings = {"window": args.window, "chunk": args.chunk, "rank": args.rank, "max-tokens": args.max_tokens}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    model = ["--model", args.model] if args.model else []
    command = [sys.executable, "-m", "locas", "memorize", str(text), "-o", str(output), *flags, *model]
    return Target([*command, "--save-every", "0", "--resume"], output, args.fork)


class Forked:
    """A run in a fork of this process, with as much of Popen's manners as is needed here."""

    def __init__(self, args: list[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            # Renews torch's thread pool, which a fork breaks, before the threads that load weights race to do it.
            torch.set_num_threads(1)
            os.dup2(self.errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(cli.main(args))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = TIMEOUT_S) -> tuple[str, str]:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"a run took longer than {timeout} s")
            time.sleep(POLL_S)
        self.errors.seek(0)
        with self.errors as file:
            return "", file.read()


def launch(target: Target) -> subprocess.Popen[str] | Forked:
    if target.fork:
        return Forked(target.command[3:])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(
        target.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def undisturbed(args: argparse.Namespace, text: Path, folder: Path) -> tuple[bytes, float]:
    """(the memory file of a run that nobody disturbs, seconds until it saved its first state)."""
    target = new_target(args, text, folder / "undisturbed.safetensors")
    began = time.monotonic()
    process = launch(target)
    while process.poll() is None and target.state() is None:
        time.sleep(POLL_S)
    startup_s = time.monotonic() - began
    finish(process)
    data = target.output.read_bytes()
    target.output.unlink()
    return data, startup_s


def finish(process: subprocess.Popen[str] | Forked) -> None:
    """Waits for the end of a process that must succeed."""
    _, errors = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise SystemExit(f"locas memorize failed ({process.returncode}):\n{errors[-2000:]}")


def one_process(target: Target, choose: random.Random, startup_s: float, kills: int, tally: Tally) -> bool:
    """Starts or resumes a run and kills it, if there are kills left and it does not end before; says if it ended."""
    began, memory = time.monotonic(), target.saved()
    process = launch(target)
    if tally.kills.total() >= kills:
        finish(process)
        return True
    saved = wait(target, process, choose, startup_s)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise SystemExit(f"locas memorize failed ({process.returncode}):\n{errors[-2000:]}")
        return True
    phase = "final save" if target.saved() != memory else "between states" if saved else "before the first state"
    tally.kills[phase] += 1
    tally.seconds.append(time.monotonic() - began)
    target.kills += 1
    tally.files_checked += check_files(target.output.parent)
    say(f"  kill {tally.kills.total()}/{kills} after {tally.seconds[-1]:.1f} s: {phase}")
    return False


def wait(target: Target, process: subprocess.Popen[str] | Forked, choose: random.Random, startup_s: float) -> bool:
    """Waits for a random moment of a random phase; says whether this process saved a state before."""
    (phase,) = choose.choices(list(PHASES), weights=list(PHASES.values()))
    more_s = choose.uniform(0, {"before the first state": startup_s, "between states": 0.1, "final save": 0.02}[phase])
    states = {"before the first state": 0, "between states": choose.randint(1, 6), "final save": sys.maxsize}[phase]
    first, memory = target.state(), target.saved()
    last = first
    until = time.monotonic() + TIMEOUT_S
    while states and process.poll() is None and time.monotonic() < until:
        if target.saved() != memory:
            break
        now = target.state()
        states -= now != last
        last = now
        time.sleep(POLL_S / 4)
    stop = time.monotonic() + more_s
    while time.monotonic() < stop and process.poll() is None:
        time.sleep(POLL_S / 4)
    return target.state() != first


def check_files(folder: Path) -> int:
    """How many memory and state files there are; raises ValueError if one cannot be read."""
    memories, states = [*folder.glob("*.safetensors")], [*folder.glob("*.partial")]
    for path in memories:
        locas.load(path)
    for path in states:
        load_tensors(path, kind=OneMemory.kind, may_be_nan=("losses.", "baseline."))
    return len(memories) + len(states)


def report(args: argparse.Namespace, tally: Tally, seconds: float) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "recipe": "kill_resume",
        "commit": git.stdout.strip() or None,
        "versions": {
            "locas": locas.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": f"{platform.machine()} CPU",
        "seeds": [args.seed],
        "settings": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "json")
        },
        "kills": tally.kills.total(),
        "kills_in_phase": {phase: tally.kills[phase] for phase in PHASES},
        "runs_completed": tally.runs,
        "identical": tally.runs,
        "files_checked": tally.files_checked,
        "seconds_until_kill_mean": round(sum(tally.seconds) / len(tally.seconds), 2),
        "seconds": round(seconds, 1),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
