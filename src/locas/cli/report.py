"""`locas report`: the page and pictures of an evaluation, drawn again from its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from locas.cli.common import UserError, out


@dataclass(frozen=True)
class Report:
    """Draw report.html and its pictures from what `locas eval books -o DIR` measured (it does so itself at its end).

    The page opens offline: open it in any browser. Needs: pip install "locas[plots]".

        locas report results/books
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder with results.json."""

    def run(self) -> int:
        from locas.evaluate.report import write_report

        try:
            page = write_report(self.folder)
        except ModuleNotFoundError as error:
            raise UserError(str(error)) from error
        out.print(str(page), soft_wrap=True, markup=False)
        return 0
