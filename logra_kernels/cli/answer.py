"""Answers of `logra query`: as text for people, as JSON for programs, as a page for a browser."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from logra_kernels.report import Provider, Report
    from logra_kernels.store import GradientStore


@dataclass(frozen=True)
class Row:
    """A stored row and its influence; `index` is its number in the store, `text` None where the store keeps none."""

    score: float
    index: int
    id: str
    source: str | None
    text: str | None


@dataclass(frozen=True)
class Answer:
    """One query: what the model says (`generated`: it wrote that itself), at what loss in nats, and who taught it.

    `cut_to`: How many positions are left of a query that was longer; None of a whole one.
    """

    id: str
    prompt: str
    completion: str
    generated: bool
    loss: float
    tokens: int
    cut_to: int | None
    rows: list[Row]


def providers(store: GradientStore, scores: Tensor) -> list[Provider]:
    """What every source is worth: the sum of its rows' scores [N], highest first; none where none are stored."""
    import pyarrow as pa

    from logra_kernels.report import Provider

    if "source" not in store.table.column_names:
        return []
    table = pa.table({"source": store.table.column("source"), "score": scores.double().cpu().numpy()})
    sums = table.group_by("source", use_threads=False).aggregate([("score", "count"), ("score", "sum")])
    found = [Provider(row["source"], row["score_count"], row["score_sum"]) for row in sums.to_pylist()]
    return sorted(found, key=lambda provider: -provider.value)


def as_json(args: argparse.Namespace, answers: list[Answer]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "store": args.store,
        "model": args.model,
        "mode": args.mode,
        "damping": args.damping,
        "order": "lowest first" if args.bottom else "highest first",
        "queries": [asdict(answer) for answer in answers],
    }


def write_report(args: argparse.Namespace, store: GradientStore, answers: list[Answer], worth: list[Provider]) -> Path:
    """Write the HTML page that `--report` names; gives its absolute path."""
    from logra_kernels.report import render

    return render(_as_report(args, store, answers, worth), args.report)


def _as_report(args: argparse.Namespace, store: GradientStore, answers: list[Answer], worth: list[Provider]) -> Report:
    from logra_kernels import report
    from logra_kernels.curvature import Damping
    from logra_kernels.store import spread_of

    def rows(answer: Answer) -> list[report.Row]:
        return [report.Row(row.id, row.source or "", row.text or "", row.score) for row in answer.rows]

    shown = [
        report.Answer(
            answer.id,
            answer.prompt,
            answer.completion,
            "the model's own continuation" if answer.generated else "given",
            answer.loss,
            answer.tokens,
            top=[] if args.bottom else rows(answer),
            opposing=rows(answer) if args.bottom else [],
        )
        for answer in answers
    ]
    facts = [
        ("model", args.model),
        ("store", f"{args.store}: {len(store):,} rows of {store.dim:,} numbers, {store.dtype}"),
        ("layers", f"{len(store.layers)}"),
        ("curvature", args.curvature),
        ("damping", str(Damping.of(args.damping, spread_of(store)))),
    ]
    cut = [answer.cut_to for answer in answers if answer.cut_to is not None]
    if cut:
        facts.append(("cut", f"{len(cut):,} of {len(answers):,} queries, to {max(cut):,} positions"))
    return report.Report(
        title="Where the words come from",
        summary=f"The rows of {args.store} with the {'lowest' if args.bottom else 'highest'} influence on "
        f"{len(answers)} {'query' if len(answers) == 1 else 'queries'}.",
        answers=shown,
        score="l-RelatIF" if args.mode == "relatif" else "influence (dot)",
        providers=worth,
        facts=[("Setting", facts)],
    )


def print_answer(answer: Answer) -> None:
    """Print one query and its rows, each on one line of the terminal."""
    width = max(60, shutil.get_terminal_size((120, 24)).columns)
    print(f"query       {answer.id}")
    if answer.prompt:
        print(f"prompt      {_clip(answer.prompt, width - 12)}")
    print(f"completion  {_clip(answer.completion, width - 12)}{'  (written by the model)' if answer.generated else ''}")
    print(f"loss        {answer.loss:.3f} nats over {answer.tokens} tokens")
    if answer.cut_to is not None:
        dropped = "its prompt's beginning was dropped first" if answer.prompt else "its end was dropped"
        print(f"cut         to {answer.cut_to:,} positions, the most of a row of this store; {dropped}")
    names = [row.id for row in answer.rows]
    sources = [row.source or "" for row in answer.rows]
    name_width = min(28, max(map(len, [*names, "id"])))
    source_width = min(20, max(map(len, [*sources, "source"])))
    print(f"{'rank':>4}  {'score':>10}  {'id':<{name_width}}  {'source':<{source_width}}  text")
    for rank, row in enumerate(answer.rows, start=1):
        head = (
            f"{rank:>4}  {row.score:>10.4g}  {_clip(row.id, name_width):<{name_width}}  "
            f"{_clip(row.source or '', source_width):<{source_width}}  "
        )
        print(head + _clip(row.text or "", max(20, width - len(head))))
    print()


def _clip(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
