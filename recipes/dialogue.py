"""Questions about long conversations (LoCoMo): settings on the development conversations, figures on the test ones.

    python recipes/dialogue.py dev ../shared/data/locomo/dev.json      # step sizes, ranks, prompts: choose from these
    python recipes/dialogue.py test ../shared/data/locomo/test.json    # what is reported
    python recipes/dialogue.py table results/dialogue_test.json

Both write results/dialogue_SPLIT.json. Answers and questions stay in a folder of their own (--work), from which a
stopped run goes on: LoCoMo's text is CC BY-NC 4.0 and does not belong into the repository.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from markdown_table import markdown

from locas.cli.common import BackboneOptions
from locas.cli.eval_dialogue import EvalDialogue
from locas.evaluate.dialogue import DialogueSettings
from locas.store import write_atomically

ROOT = Path(__file__).parents[1]
METHODS = {
    "dev": (
        "none,context,bm25,"
        "locas,locas:lr=0.035,locas:lr=0.14,locas:rank=16,locas:steps=2,locas-paper,"
        "templora-paper,templora-tuned,templora-tuned:lr=5e-4,templora-tuned:lr=1e-3,templora-tuned:lr=4e-3,"
        "locas+bm25,locas:lr=0.035+bm25,templora-tuned+bm25"
    ),
    "test": "none,context,bm25,templora-paper,templora-tuned,locas-paper,locas,templora-tuned+bm25,locas+bm25",
}
COLUMNS = (
    ("f1", "F1", 100),
    ("gold_ll_per_token", "gold, nats per token", 1),
    ("gold_ll_per_answer", "gold, nats per answer", 1),
    ("gold_over_others", "gold over others, %", 100),
    ("gained_over_others", "gained over others, %", 100),
)


def main() -> int:
    """Runs one split, or prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dev", "test", "table"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--methods", help="in place of the split's own")
    parser.add_argument("--prompt", choices=("plain", "locomo"), default="plain")
    parser.add_argument("--max-questions", type=int)
    parser.add_argument("--max-conversations", type=int)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "dialogue")
    parser.add_argument("--output", type=Path, help="default: results/dialogue_SPLIT.json")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.what == "table":
        print(table(json.loads(args.path.read_text())))
        return 0
    command = EvalDialogue(
        path=str(args.path),
        output=str(args.work / args.what),
        methods=args.methods or METHODS[args.what],
        max_conversations=args.max_conversations,
        backbone=BackboneOptions(model=args.model, device=args.device),
        ask=DialogueSettings(prompt=args.prompt, max_questions=args.max_questions),
    )
    command.run()
    summary = (args.work / args.what / "dialogue.json").read_bytes()
    write_atomically(args.output or ROOT / "results" / f"dialogue_{args.what}.json", summary)
    return 0


def table(result: dict[str, Any]) -> str:
    """Figures of all methods as Markdown: questions that have an answer, each category's F1, traps, differences."""
    methods = result["methods"]
    lines = [
        [name, *(_cell(m["answerable"][key], factor) for key, _, factor in COLUMNS)] for name, m in methods.items()
    ]
    parts = [
        f"## Dialogue: {len(result['conversations'])} conversations of {result['file']}\n"
        f"{next(iter(methods.values()))['answerable']['n']} questions that have an answer; prompt "
        f"`{result['settings']['ask']['prompt']}`.\n",
        markdown(["method", *(title for _, title, _ in COLUMNS)], lines),
        markdown(*_by_category(methods)),
    ]
    rows = [r for r in result["comparisons"] if r["figure"] == "gold_ll_per_token"]
    if rows:
        parts.append("Gold answers' log-likelihood, nats per token, difference of the conversations' means:\n")
        parts.append(
            markdown(
                ["from", "to", "conversations", "difference", "95% interval"],
                [[r["from"], r["to"], str(r["conversations"]), f"{r['mean']:+.3f}", _interval(r)] for r in rows],
            )
        )
    return "\n".join(parts)


def _by_category(methods: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(c for m in methods.values() for c in m["categories"]))
    header = ["F1", *names, "trap's F1, negative", "gold over trap, %"]
    lines = []
    for name, method in methods.items():
        adversarial = method["categories"].get("adversarial", {})
        cells = [_cell(method["categories"].get(c, {}).get("f1"), 100) for c in names]
        traps = [_cell(adversarial.get(key), 100) for key in ("trap_f1", "gold_over_trap")]
        lines.append([name, *cells, *traps])
    return header, lines


def _cell(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.1f}" if factor == 100 else f"{value:.3f}"


def _interval(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"


if __name__ == "__main__":
    sys.exit(main())
