"""What the answers to LoCoMo's questions say: figures for each category, methods compared pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from locas.evaluate.dialogue import Method
from locas.evaluate.locomo import ADVERSARIAL, CATEGORIES
from locas.evaluate.statistics import paired_bootstrap

Item = dict[str, Any]
Results = dict[str, dict[str, Any]]
COMPARED = ("f1", "gold_ll_per_token", "gold_ll_per_answer", "gold_over_others")


def summarise(results: Results, methods: Sequence[Method]) -> dict[str, Any]:
    """Figures of every method, and their differences.

    Args:
        results: what `locas.evaluate.dialogue.run` returned.
        methods: those it was given.

    Returns:
        methods: {NAME: {categories: {NAME: figures}, answerable: figures of categories 1-4 together, per_conversation:
        {NAME: figures of categories 1-4}, reading, left_out}}; comparisons: for each pair of methods and each of
        `COMPARED`, the mean difference over conversations with a bootstrap interval.
    """
    bases = {m.name: _base(m, methods) for m in methods}
    summary: dict[str, Any] = {"methods": {}, "comparisons": []}
    for name, conversations in results.items():
        base = results.get(bases[name] or "")
        pairs = {c: _pairs(cell, base[c] if base else None) for c, cell in conversations.items()}
        every = [pair for some in pairs.values() for pair in some]
        summary["methods"][name] = {
            "categories": {
                title: figures([p for p in every if p[0]["category"] == number])
                for number, title in CATEGORIES.items()
                if any(p[0]["category"] == number for p in every)
            },
            "answerable": figures(_answerable(every)),
            "per_conversation": {c: figures(_answerable(some)) for c, some in pairs.items()},
            "reading": _reading([cell["reading"] for cell in conversations.values()]),
            "left_out": sum(p[0]["left_out"] > 0 for p in every),
        }
    for one, other in combinations(results, 2):
        summary["comparisons"] += _compare(summary["methods"], one, other)
    return summary


def figures(pairs: Sequence[tuple[Item, Item | None]]) -> dict[str, Any]:
    """Figures of some items, each with the same item of the method without its learner (None where not asked).

    Returns:
        n: how many; f1: the benchmark's, mean; gold_ll_per_token: log-likelihood of the gold answers, over all their
        tokens; gold_ll_per_answer: its mean over answers; gold_over_others: how often, of all other answers asked
        about, the gold one is likelier per token (a tie counts half); gained_over_others: how often it gained more
        through the learner. Adversarial items: trap_f1, trap_ll_per_token, gold_over_trap per token, and per answer.
        None where there is nothing to average. All log-likelihoods in nats.
    """
    items = [item for item, _ in pairs]
    result: dict[str, Any] = {
        "n": len(items),
        "f1": _mean([item["f1"] for item in items]),
        "gold_ll_per_token": _per_token([item["gold"] for item in items]),
        "gold_ll_per_answer": _mean([-item["gold"]["nll"] for item in items]),
        "gold_over_others": _mean([x for item in items for x in [_beats(item)] if x is not None]),
        "gained_over_others": _mean([x for pair in pairs for x in [_gains(*pair)] if x is not None]),
    }
    trapped = [item for item in items if item["trap"] is not None]
    if trapped:
        result |= {
            "trap_f1": _mean([item["trap_f1"] for item in trapped]),
            "trap_ll_per_token": _per_token([item["trap"] for item in trapped]),
            "gold_over_trap": _mean([_win(_rate(i["gold"]), _rate(i["trap"])) for i in trapped]),
            "gold_over_trap_per_answer": _mean([_win(-i["gold"]["nll"], -i["trap"]["nll"]) for i in trapped]),
        }
    return result


def _base(method: Method, methods: Sequence[Method]) -> str | None:
    """The method with the same context and no learner."""
    if method.learner is None:
        return None
    return next((m.name for m in methods if m.learner is None and m.context == method.context), None)


def _pairs(cell: dict[str, Any], base: dict[str, Any] | None) -> list[tuple[Item, Item | None]]:
    items = cell["items"]
    return list(zip(items, base["items"] if base else [None] * len(items), strict=True))


def _answerable(pairs: Sequence[tuple[Item, Item | None]]) -> list[tuple[Item, Item | None]]:
    return [pair for pair in pairs if pair[0]["category"] != ADVERSARIAL]


def _rate(answer: dict[str, Any]) -> float:
    """Log-likelihood per token."""
    return float(-answer["nll"] / answer["tokens"])


def _win(one: float, other: float) -> float:
    return 1.0 if one > other else 0.5 if one == other else 0.0


def _beats(item: Item) -> float | None:
    return _mean([_win(_rate(item["gold"]), _rate(other)) for other in item["others"]])


def _gains(item: Item, base: Item | None) -> float | None:
    """How often the gold answer gained more per token than other answers did."""
    if base is None:
        return None
    gold = _rate(item["gold"]) - _rate(base["gold"])
    others = zip(item["others"], base["others"], strict=True)
    return _mean([_win(gold, _rate(now) - _rate(before)) for now, before in others])


def _per_token(answers: Sequence[dict[str, Any]]) -> float | None:
    tokens = sum(a["tokens"] for a in answers)
    return -sum(a["nll"] for a in answers) / tokens if tokens else None


def _reading(readings: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [r for r in readings if r is not None]
    if not known:
        return None
    return {
        "tokens": sum(r["tokens"] for r in known),
        "seconds": round(sum(r["seconds"] for r in known), 2),
        "parameters": known[0]["parameters"],
        "bits_per_byte": _mean([r["bits_per_byte"] for r in known]),
    }


def _compare(methods: dict[str, Any], one: str, other: str) -> list[dict[str, Any]]:
    """other - one, over conversations."""
    rows = []
    first, second = methods[one]["per_conversation"], methods[other]["per_conversation"]
    for what in COMPARED:
        differences = [
            second[c][what] - first[c][what]
            for c in first
            if first[c][what] is not None and second[c][what] is not None
        ]
        if differences:
            interval = paired_bootstrap(differences)
            rows.append(
                {
                    "figure": what,
                    "from": one,
                    "to": other,
                    "conversations": len(differences),
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
