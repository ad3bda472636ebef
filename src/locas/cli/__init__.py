"""The command line: `locas memorize`, `score`, `generate`, `chat`, `compose`, `compress`, `anchor`, `merge`,
`unmerge`, `info`, `eval`, `report`, `bench`, `demo`.

Flags are generated from the settings' dataclasses, where their defaults and help texts stand.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tyro

from locas._version import __version__
from locas.backbone import is_out_of_memory
from locas.cli.anchor import Anchor
from locas.cli.bench import Bench
from locas.cli.common import UserError, fail, out, print_json
from locas.cli.compose import Compose
from locas.cli.compress import Compress
from locas.cli.demo import Demo
from locas.cli.evaluate import Evaluate
from locas.cli.info import Info
from locas.cli.memorize import Memorize, memorize_defaults, without_defaults
from locas.cli.merge import Merge, Unmerge
from locas.cli.report import Report
from locas.cli.scarce import advice
from locas.cli.score import ScoreText
from locas.cli.talk import Chat, Generate

_DESCRIPTION = """Long-term memory for language models that lives in weights (Locas, arXiv:2602.05085).

Read a text into a memory file, then use the file instead of the text:

    locas memorize book.txt -o book.safetensors --compare
    locas score chapter.txt --memory book.safetensors
    locas chat --memory book.safetensors

Everything works offline with the built-in backbone; --model takes any folder or hub name.
`locas demo` shows it all in two minutes."""

# glibc's numbers for what `mallopt` sets (malloc.h), and to what: blocks of fewer bytes lie in the heap, and so many
# freed ones stay at its end.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _IN_HEAP = 1 << 30, 1 << 26


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 (failed), 2 (wrong input), 130 (interrupted), 141
    (nobody reads the output any more)."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    if args == ["--version"]:
        out.print(f"locas {__version__}")
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_transformers()
    _keep_freed_memory()
    command: Any = None
    try:
        with _explained(as_json):
            command = _parse(args)
        return int(command.run())
    except BrokenPipeError:  # whoever read the output has seen enough: `locas ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed into it at the end
        return 141
    except (UserError, ValueError, FloatingPointError, OSError, TypeError) as error:
        if os.environ.get("LOCAS_TRACEBACK"):
            raise
        return fail(error, as_json)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("LOCAS_TRACEBACK") or not is_out_of_memory(error):
            raise
        return fail(UserError(advice(error, command)), as_json, status=1)
    except KeyboardInterrupt:
        return 130


def _keep_freed_memory() -> None:
    """On Linux with glibc: what one chunk frees stays there for the next. Left to itself glibc gives most of it back,
    and each page is fetched again, and filled with zeros, when it is next written to: up to 7% of a chunk learnt.
    Whoever set malloc up through the environment is not overruled."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


@contextlib.contextmanager
def _explained(as_json: bool) -> Iterator[None]:
    """What the parser of arguments draws on standard error: an error object as well with --json; and where a setting
    refused its value, the setting's own words, without the parser's names for where it stands."""
    drawn = _Drawn()
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    except SystemExit as stop:
        said = " ".join(re.sub(r"[─-╿]|^ *-{4,} *$", " ", drawn.getvalue(), flags=re.M).split())
        refused = re.search(r"Error parsing \S*__tyro\S*: (.*?)(?: For full helptext|$)", said)
        if stop.code and refused:
            raise UserError(refused[1]) from None
        sys.stderr.write(drawn.getvalue())
        if stop.code and as_json:
            print_json({"error": said})
        raise
    sys.stderr.write(drawn.getvalue())


class _Drawn(io.StringIO):
    """Text that is drawn as on the standard error stream that it stands for: in colours on a terminal."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and sys.__stderr__.isatty()


def _parse(args: list[str]) -> Any:
    listed = not args or args[0].startswith("-")

    def sub(name: str, command: type, **how: Any) -> Any:
        # The list of commands shows one sentence each; a command's own help shows all of its docstring.
        text = inspect.cleandoc(str(command.__doc__))
        return Annotated[
            command,
            tyro.conf.subcommand(name, description=text.partition("\n\n")[0] if listed else text, **how),
        ]

    memorize = memorize_defaults(args)
    if args[:1] == ["memorize"]:
        args = without_defaults(args, memorize)
    commands: Any = (
        sub("memorize", Memorize, default=memorize)
        | sub("score", ScoreText)
        | sub("generate", Generate)
        | sub("chat", Chat)
        | sub("compose", Compose)
        | sub("compress", Compress)
        | sub("anchor", Anchor)
        | sub("merge", Merge)
        | sub("unmerge", Unmerge)
        | sub("info", Info)
        | sub("eval", Evaluate)
        | sub("report", Report)
        | sub("bench", Bench)
        | sub("demo", Demo)
    )
    return tyro.cli(
        commands,
        args=args,
        prog="locas",
        description=_DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _quiet_transformers() -> None:
    """Only our own progress bars, those of downloads, and errors on the terminal."""
    import huggingface_hub
    import transformers

    transformers.logging.disable_progress_bar()  # of loading, and the hub's with it
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()
    transformers.logging.set_verbosity_error()
