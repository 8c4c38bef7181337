"""`logra query`: which stored rows taught the model what it says."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logra_kernels.cli import checks, session
from logra_kernels.cli.answer import Answer, Row, as_json, print_answer, providers, write_report
from logra_kernels.errors import LograError
from logra_kernels.integrations.surrogates import refuse_half_pairs

if TYPE_CHECKING:
    from torch import nn

    from logra_kernels.run import Query, Run
    from logra_kernels.store import GradientStore

_TOGETHER = 64  # queries that are scored in one pass over the store


@dataclass(frozen=True)
class Question:
    """What the model says after a prompt; `completion` None asks the model itself. A text has an empty prompt."""

    id: str
    prompt: str
    completion: str | None


@dataclass(frozen=True)
class _Asked:
    """A question's loss in nats, how many tokens it is of, and whether it was cut."""

    loss: float
    tokens: int
    cut: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument("--model", required=True, metavar="MODEL_DIR", help="the model that the store was logged with")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="ask about the completion of this prompt")
    asked.add_argument("--text", help="ask about all of this text")
    asked.add_argument("--file", metavar="JSONL", help='one object a line: "text", or "prompt" and maybe "completion"')
    parser.add_argument("--completion", help="what follows --prompt; without it the model continues greedily")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of the model's own continuation (default 32)")
    parser.add_argument("-k", type=int, default=10, help="rows shown for each query (default 10)")
    parser.add_argument(
        "--search", choices=["exact", "index"], default="exact", help="index reads only what `logra index` shortlists"
    )
    parser.add_argument(
        "--query-format", choices=["int8", "fp32"], help="of a quantised store's queries: the fastest, or the finest"
    )
    parser.add_argument("--bottom", action="store_true", help="the lowest scores: rows that taught it otherwise")
    parser.add_argument("--mode", choices=["relatif", "dot"], default="relatif", help="of scoring (default relatif)")
    parser.add_argument("--damping", type=float, help="lambda; default as the projection needs")
    session.add_curvature_argument(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="queries in one forward and backward (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", metavar="HTML", help="also write a self-contained HTML page")
    session.add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, score every stored row, print the rows at the top (or the bottom)."""
    if args.completion is not None and args.prompt is None:
        raise ValueError("--completion follows a --prompt; give both, or --text")
    checks.check_least(args, k=1, batch_size=1, max_new_tokens=1)
    if args.report:
        checks.check_report(args.report)
    questions = _questions(args)

    import torch

    from logra_kernels.integrations import causal_lm
    from logra_kernels.run import Query, Run
    from logra_kernels.store import GradientStore

    # Before the model is loaded, which takes longer than to see that there is no store.
    store = GradientStore.open(args.store)
    checks.check_curvature(args.curvature, args.store)
    model, tokenizer = causal_lm.load(args.model, session.device(args.device))
    longest = session.max_length(model, session.stored_max_length(store.fingerprints))
    facts = session.fingerprints(tokenizer, longest)
    known = {name: value for name, value in facts.items() if name in store.fingerprints}
    answers: list[Answer] = []
    with Run(args.store, model, fingerprints=known, curvature=args.curvature) as asking:
        total = torch.zeros(store.dim, dtype=torch.float64, device="cpu")
        together = max(_TOGETHER, args.batch_size)
        for start in range(0, len(questions), together):
            query, asked = _ask(asking, model, tokenizer, questions[start : start + together], longest, args)
            answers += asked
            total += query.rows.double().sum(dim=0)
        if args.report:
            # a score is linear in its query
            everything = Query(["all"], total.float()[None])
            worth = providers(store, asking.scores(everything, mode=args.mode, damping=args.damping)[0])
    if args.json:
        print(json.dumps(as_json(args, answers), indent=1, ensure_ascii=False))
    else:
        for answer in answers:
            print_answer(answer)
    if args.report:
        # Not on stdout, which may be JSON for another program.
        print(f"report      {write_report(args, store, answers, worth)}", file=sys.stderr)
    return 0


def _ask(
    asking: Run, model: nn.Module, tokenizer: Any, questions: list[Question], longest: int, args: argparse.Namespace
) -> tuple[Query, list[Answer]]:
    """The gradients of some questions, and the answers."""
    completions = [
        question.completion
        if question.completion is not None
        else _continue(model, tokenizer, question, args.max_new_tokens)
        for question in questions
    ]
    query, found = _gradients(asking, model, tokenizer, questions, completions, longest, args.batch_size)
    top = asking.topk(
        query,
        k=args.k,
        mode=args.mode,
        damping=args.damping,
        largest=not args.bottom,
        search=args.search,
        query_format=args.query_format,
    )
    answers = [
        Answer(
            id=question.id,
            prompt=question.prompt,
            completion=completion,
            generated=question.completion is None,
            loss=found[i].loss,
            tokens=found[i].tokens,
            cut_to=longest if found[i].cut else None,
            rows=_rows(asking.store, top.values[i].tolist(), top.indices[i].tolist(), top.ids[i]),
        )
        for i, (question, completion) in enumerate(zip(questions, completions, strict=True))
    ]
    return query, answers


def _gradients(
    asking: Run,
    model: nn.Module,
    tokenizer: Any,
    questions: list[Question],
    completions: list[str],
    longest: int,
    batch_size: int,
) -> tuple[Query, list[_Asked]]:
    """The questions' gradients, and what else was met."""
    from logra_kernels.integrations import causal_lm
    from logra_kernels.run import Query

    ids, prompts = [question.id for question in questions], [question.prompt for question in questions]
    found: dict[int, _Asked] = {}
    parts: list[Query] = []
    batches = causal_lm.batches_of_like_length(
        tokenizer, prompts, batch_size, completions=completions, max_length=longest, ids=ids
    )
    for places, batch in batches:
        with asking.query(ids=batch.ids, sequence_length=batch.sequence_length) as part:
            nll, tokens = causal_lm.losses(model, batch.to(next(model.parameters()).device))
            nll.sum().backward()
        parts.append(part)
        found.update(zip(places, map(_Asked, nll.tolist(), tokens.tolist(), batch.cut), strict=True))
    coming = list(found)
    back = sorted(range(len(coming)), key=coming.__getitem__)
    return Query(ids, Query.cat(parts).rows[back]), [found[i] for i in range(len(ids))]


def _continue(model: nn.Module, tokenizer: Any, question: Question, max_new_tokens: int) -> str:
    from logra_kernels.integrations.causal_lm import continue_greedy

    completion = continue_greedy(model, tokenizer, question.prompt, max_new_tokens)
    if not completion:
        raise LograError(f"the model writes nothing after the prompt of {question.id}; give a --completion")
    return completion


def _rows(store: GradientStore, scores: list[float], indices: list[int], ids: list[str]) -> list[Row]:
    taken = store.table.take(indices)
    blank = [None] * len(indices)
    sources, texts = (
        taken.column(name).to_pylist() if name in taken.column_names else blank for name in ("source", "text")
    )
    return [Row(*values) for values in zip(scores, indices, ids, sources, texts, strict=True)]


def _questions(args: argparse.Namespace) -> list[Question]:
    for name in ("prompt", "completion", "text"):
        refuse_half_pairs(getattr(args, name) or "", f"--{name}")
    if args.prompt is not None:
        return [Question("query", args.prompt, args.completion)]
    if args.text is not None:
        return [Question("query", "", args.text)]
    return _read_questions(Path(args.file))


def _read_questions(path: Path) -> list[Question]:
    """One question for each line of a JSONL file.

    Raises:
        LograError: The file cannot be read, or a line asks nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # text may hold other ends of lines
    except UnicodeDecodeError as error:
        raise LograError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file") from error
    found: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LograError(f"{path} line {number}: not JSON ({error.msg}); one object a line") from error
        found.append(_question(record, f"{path} line {number}", f"q{len(found)}"))
    if not found:
        raise LograError(f"{path} holds no queries; give at least one line")
    return found


def _question(record: Any, place: str, default_id: str) -> Question:
    fields = record if isinstance(record, dict) else {}
    text, prompt, completion = (fields.get(name) for name in ("text", "prompt", "completion"))
    if not all(value is None or isinstance(value, str) for value in (text, prompt, completion)):
        raise LograError(f'{place}: "text", "prompt" and "completion" must be strings')
    if (text is None) == (prompt is None) or (text is not None and completion is not None):
        raise LograError(f'{place}: give either "text", or "prompt" with or without "completion"')
    name = str(fields.get("id", default_id))
    for field, value in (("text", text), ("prompt", prompt), ("completion", completion), ("id", name)):
        refuse_half_pairs(value or "", f'{place}: "{field}"')
    return Question(name, "", text) if prompt is None else Question(name, prompt, completion)
