"""`locas eval books`, `dialogue`, ...: measuring memories beside what people use instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from locas.cli.eval_books import EvalBooks
from locas.cli.eval_dialogue import EvalDialogue
from locas.cli.eval_forgetting import EvalForgetting

_sub = tyro.conf.subcommand


@dataclass(frozen=True)
class Evaluate:
    """Measure memories beside what people use instead: on books, dialogues, and what is forgotten."""

    what: (
        Annotated[EvalBooks, _sub("books")]
        | Annotated[EvalDialogue, _sub("dialogue")]
        | Annotated[EvalForgetting, _sub("forgetting")]
    )

    def run(self) -> int:
        return self.what.run()
