"""Bars for what takes minutes and tells how far it is: `(done, of how many)`, as the library's `on_progress` has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from locas.cli.common import err

OnProgress = Callable[[int, int], None]
_LINE_EVERY_S = 10.0


@contextmanager
def bar(what: str) -> Iterator[OnProgress]:
    """A live bar on a terminal, gone at the end; elsewhere a line now and then, and none in the first seconds."""
    if not err.is_terminal:
        yield _Lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=err, transient=True) as shown:
        task = shown.add_task(escape(what), total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, what: str) -> None:
        self.what, self.last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= _LINE_EVERY_S:
            self.last = time.monotonic()
            err.print(f"{self.what}: {100 * done / total:.0f}%", soft_wrap=True, markup=False)
