"""What a run of the demo found, as a report."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers

import logra_kernels
from logra_kernels import report
from logra_kernels.curvature import Damping
from logra_kernels.demo import attribution, proof, queries
from logra_kernels.demo.corpus import Corpus
from logra_kernels.demo.model import Settings

_SHOWN = 8
_SHOWN_OPPOSING = 3


@dataclass(frozen=True)
class Outcome:
    """What one seed gave.

    Attributes:
        asked: The Q queries.
        found: Their scores.
        nll, tokens: Each query's summed loss in nats under the trained model, and its number of tokens.
        removed: The rows that the retrainings left out.
        losses: Arm -> the queries' loss in nats a token; empty where nothing was retrained.
        parameters: Of the model.
    """

    asked: list[queries.Question]
    found: attribution.Found
    nll: list[float]
    tokens: list[int]
    removed: proof.Removal
    losses: dict[str, list[float]]
    parameters: int


def build(
    corpus: Corpus,
    settings: Settings,
    outcomes: Sequence[Outcome],
    seconds: Mapping[str, float],
    *,
    rank: int,
    removed: int,
) -> report.Report:
    """The page: queries and values of the first seed, the proof over all of them.

    Args:
        corpus, settings, outcomes: What was trained on, how, and what came of it, one outcome a seed.
        seconds: Of each stage, added up over the seeds.
        rank: Of the projection.
        removed: How many top rows of every query the retraining left out.
    """
    first = outcomes[0]
    modules = len({passage.source for passage in corpus.train})
    return report.Report(
        title="Where a small language model's words come from",
        summary=(
            f"A transformer of {first.parameters:,} parameters was trained on {len(corpus.train):,} passages from the "
            f"docstrings of {modules} modules of Python {platform.python_version()}'s standard library. For "
            f"{len(first.asked)} queries, influence functions in a projected gradient space name the passages behind "
            "each, and what every module is worth to them."
        ),
        answers=_answers(corpus, first),
        score="l-RelatIF",
        providers=[report.Provider(*entry) for entry in first.found.value_by_source(corpus.train)],
        provider_noun="module",
        proof=_proof(outcomes) if first.losses else None,
        facts=_facts(corpus, settings, first, seconds, rank, removed),
    )


def _answers(corpus: Corpus, outcome: Outcome) -> list[report.Answer]:
    def rows(query: int, numbers: Sequence[int]) -> list[report.Row]:
        passages = [corpus.train[number] for number in numbers]
        scores = outcome.found.ranking[query, list(numbers)].tolist()
        return [report.Row(p.id, p.source, p.text, score) for p, score in zip(passages, scores, strict=True)]

    return [
        report.Answer(
            question.id,
            question.prompt,
            question.completion,
            question.origin,
            outcome.nll[query],
            outcome.tokens[query],
            rows(query, outcome.found.top(query, _SHOWN)),
            rows(query, outcome.found.opposing(query, _SHOWN_OPPOSING)),
        )
        for query, question in enumerate(outcome.asked)
    ]


def _proof(outcomes: Sequence[Outcome]) -> report.Proof:
    def arm(name: str, key: str, removed: list[int]) -> report.Arm:
        return report.Arm(name, removed, [outcome.losses[key] for outcome in outcomes])

    return report.Proof(
        [question.id for question in outcomes[0].asked],
        arm("all passages", "full", [0] * len(outcomes)),
        arm("without random passages", "random", [len(outcome.removed.random) for outcome in outcomes]),
        arm("without the top passages", "top", [len(outcome.removed.top) for outcome in outcomes]),
        note=(
            "Every seed has its own initialisation, order of rows, random rows and continuations; "
            "the texts of the queries above are the first seed's."
            if len(outcomes) > 1
            else ""
        ),
    )


def _facts(
    corpus: Corpus, settings: Settings, outcome: Outcome, seconds: Mapping[str, float], rank: int, removed: int
) -> list[tuple[str, list[tuple[str, str]]]]:
    found = outcome.found
    return [
        (
            "Model",
            [
                ("architecture", f"Llama, {settings.layers} layers of width {settings.hidden}"),
                ("parameters", f"{outcome.parameters:,}"),
                ("vocabulary", f"{settings.vocabulary:,} (byte-level BPE)"),
                ("training", f"{settings.steps} steps of {settings.batch} passages"),
                ("epochs", f"{settings.steps * settings.batch / len(corpus.train):.1f}"),
                ("optimiser", f"AdamW, {settings.learning_rate:g}, cosine"),
            ],
        ),
        (
            "Attribution",
            [
                ("rows", f"{len(corpus.train):,}"),
                ("layers", str(found.layers)),
                ("rank", f"{rank} x {rank} a layer, PCA"),
                ("row length", f"{found.dim:,}"),
                ("curvature", "half raw Fisher, half its Kronecker product"),
                ("damping", str(Damping(whole=1.0))),
                ("order of rows", "l-RelatIF"),
                ("value of modules", "influence a token (dot)"),
                ("rows removed a query", str(removed)),
            ],
        ),
        ("Seconds", [(name, f"{taken:.1f}") for name, taken in seconds.items()]),
        (
            "Versions",
            [
                ("logra_kernels", logra_kernels.__version__),
                ("torch", torch.__version__),
                ("transformers", transformers.__version__),
                ("Python", platform.python_version()),
                ("corpus", corpus.fingerprint),
                ("machine", platform.machine()),
            ],
        ),
    ]
