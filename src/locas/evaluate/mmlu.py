"""MMLU (arXiv:2009.03300) through lm-evaluation-harness, from local CSV files, without a network.

    mmlu = Mmlu(Path("mmlu"), shots=5, limit=None)
    print(mmlu(backbone)["accuracy"])

The harness's own tasks are used, prompts and scoring included; only where they get their data from is changed.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locas.backbone import Backbone
from locas.forward import device_of, frozen, trained_context

_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
_LETTERS = 4
_ROOMY_TOKENS = 2048  # five examples fit into this much for all but a few subjects


class Mmlu:
    """MMLU questions from a folder.

    Args:
        folder: with test/SUBJECT_test.csv and, for examples, dev/SUBJECT_dev.csv; columns question, choice0 to choice3
            and answer (0 to 3).
        shots: solved examples before each question; None: 5 where the backbone's context is long enough, else 0.
        limit: questions of each subject, the first ones; None: all.
        subjects: only these; None: all that the folder has.
        batch: questions at once.

    Attributes:
        questions_sha256: of the questions that are asked, and the solved examples.

    Raises:
        ValueError: lm-evaluation-harness is missing, a folder without such files, or a damaged file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shots: int | None = None,
        limit: int | None = None,
        subjects: tuple[str, ...] = (),
        batch: int = 8,
    ) -> None:
        lm_eval = _harness()
        if (shots is not None and not 0 <= shots <= 5) or (limit is not None and limit < 1) or batch < 1:
            raise ValueError(f"MMLU takes 0 to 5 examples and a limit of 1 or more; got {shots} and {limit}")
        self.shots, self.limit, self.batch = shots, limit, batch
        self.data = {
            path.name.removesuffix("_test.csv"): {
                "test": read_csv(path),
                "dev": _examples(path.parents[1] / "dev" / path.name.replace("_test.csv", "_dev.csv")),
            }
            for path in sorted(Path(folder).glob("test/*_test.csv"))
        }
        unknown = [s for s in subjects if s not in self.data]
        if not self.data or unknown:
            what = f"no subject {', '.join(unknown)}" if unknown else "no MMLU files"
            raise ValueError(f"{folder} has {what}; it should hold test/SUBJECT_test.csv and dev/SUBJECT_dev.csv")
        self.data = {name: splits for name, splits in self.data.items() if not subjects or name in subjects}
        text = repr([sorted(self.data.items()), shots, limit, lm_eval.__version__])
        self.key = hashlib.sha256(text.encode()).hexdigest()
        asked = {name: [splits["test"][:limit], splits["dev"]] for name, splits in self.data.items()}
        self.questions_sha256 = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def __call__(self, backbone: Backbone) -> dict[str, Any]:
        """Asks the backbone, with whatever is attached to it.

        Returns:
            accuracy: over all questions; standard_error: of it; n; shots; subjects: {NAME: accuracy}; cut: questions
            whose prompt was cut on the left to fit; harness: its version.
        """
        lm_eval = _harness()
        shots = self.shots
        if shots is None:
            shots = (
                5
                if all(splits["dev"] for splits in self.data.values())
                and (trained_context(backbone.model) or _ROOMY_TOKENS) >= _ROOMY_TOKENS
                else 0
            )
        with _offline(), _quietly(), frozen(backbone.model):
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            model = HFLM(
                pretrained=backbone.model,
                tokenizer=copy.deepcopy(backbone.tokenizer),  # it gets a padding token
                batch_size=self.batch,
                max_length=trained_context(backbone.model) or _ROOMY_TOKENS,
                device=str(device_of(backbone.model)),
            )
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[self._task(lm_eval, subject) for subject in self.data],
                num_fewshot=shots,
                limit=self.limit,
                task_manager=TaskManager(include_defaults=False),  # else it first reads thousands of files
                bootstrap_iters=0,
                log_samples=True,
            )
        return self._figures(backbone, found, shots, lm_eval.__version__)

    def _task(self, lm_eval: Any, subject: str) -> Any:
        """The harness's own task, with our data."""
        from lm_eval.api.task import ConfigurableTask

        config = _harness_config(lm_eval, subject)
        splits = {name: rows for name, rows in self.data[subject].items() if rows}
        if "dev" not in splits:
            config = {key: value for key, value in config.items() if not key.startswith("fewshot")}
        return ConfigurableTask(config=config | {"custom_dataset": functools.partial(_datasets, splits)})

    def _figures(self, backbone: Backbone, found: Any, shots: int, version: str) -> dict[str, Any]:
        samples = [s for some in found["samples"].values() for s in some]
        right = [float(s["acc"]) for s in samples]
        mean = sum(right) / len(right)
        longest = trained_context(backbone.model) or _ROOMY_TOKENS
        prompts = [_prompt(sample["arguments"]) for sample in samples]
        cut = sum(backbone.encode(p)[0].numel() + 1 > longest for p in prompts)
        return {
            "accuracy": mean,
            "standard_error": (mean * (1 - mean) / max(1, len(right) - 1)) ** 0.5,
            "n": len(right),
            "shots": shots,
            "cut": cut,
            "subjects": {
                name.removeprefix("mmlu_"): sum(float(s["acc"]) for s in some) / len(some)
                for name, some in found["samples"].items()
            },
            "harness": version,
        }


def _prompt(arguments: Any) -> str:
    """Of a sample: of the first of its four requests."""
    return str(arguments["gen_args_0"]["arg_0"] if isinstance(arguments, dict) else arguments[0][0])


def read_csv(path: Path) -> list[dict[str, Any]]:
    """[{"question", "choices": 4 texts, "answer": 0-3}] of a file; fields may hold line breaks.

    Raises:
        ValueError: other columns, or an answer out of range; the message names file and line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; they should be {', '.join(_COLUMNS)}")
        rows = []
        for row in reader:
            answer = row["answer"]
            if None in row or None in row.values() or answer not in map(str, range(_LETTERS)):
                raise ValueError(f"line {reader.line_num} of {path} is not a question with an answer of 0 to 3: {row}")
            choices = [row[f"choice{i}"] for i in range(_LETTERS)]
            rows.append({"question": row["question"], "choices": choices, "answer": int(answer)})
    if not rows:
        raise ValueError(f"{path} has no questions")
    return rows


def _harness_config(lm_eval: Any, subject: str) -> dict[str, Any]:
    """What the harness says about a subject, its data's place left out."""
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    path = folder / f"mmlu_{subject}.yaml"
    if not path.is_file():
        raise ValueError(f"lm-evaluation-harness {lm_eval.__version__} has no task mmlu_{subject}")
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / own.pop("include")).read_text(encoding="utf-8")) | own
    return {key: value for key, value in config.items() if not key.startswith("dataset_")}


def _datasets(splits: dict[str, Any], **ignored: Any) -> dict[str, Any]:
    """What the harness would have downloaded."""
    from datasets import Dataset

    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


def _examples(path: Path) -> list[dict[str, Any]]:
    return read_csv(path) if path.is_file() else []


def _harness() -> Any:
    try:
        with _offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lm_eval
            import lm_eval.evaluator
    except ImportError as error:
        raise ValueError('MMLU needs lm-evaluation-harness; install it with: pip install "locas[eval]"') from error
    return lm_eval


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing here needs a network, and nothing may ask for one."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The harness draws bars and logs every task; what it would print is dropped, warnings of its own included."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
