"""What a report shows, as plain data: nothing here knows where it was computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev


@dataclass(frozen=True)
class Row:
    """A training row and its score for one query; positive means that training on it lowers the query's loss."""

    id: str
    source: str
    text: str
    score: float


@dataclass(frozen=True)
class Answer:
    """One query and the rows behind it.

    Attributes:
        id: Short name, unique in the report.
        prompt: What the model was given; empty when the loss is taken on the whole text.
        completion: The text whose loss was attributed.
        origin: Where the completion comes from, in a few words ("the model's own continuation").
        loss: Sum of its negative log-likelihood, in nats.
        tokens: How many tokens that sum runs over.
        top: Rows of highest score, highest first.
        opposing: Rows of lowest score, lowest first.
    """

    id: str
    prompt: str
    completion: str
    origin: str
    loss: float
    tokens: int
    top: Sequence[Row]
    opposing: Sequence[Row] = ()


@dataclass(frozen=True)
class Provider:
    """What all rows of one source are worth to the queries together: `value` is the sum of their scores."""

    source: str
    rows: int
    value: float


@dataclass(frozen=True)
class Arm:
    """One retraining: `losses[seed][query]` in nats a token, after `removed[seed]` rows were left out."""

    name: str
    removed: Sequence[int]
    losses: Sequence[Sequence[float]]

    def means(self) -> list[float]:
        """Mean over the queries, one for each seed."""
        return [mean(losses) for losses in self.losses]

    def query_means(self) -> list[float]:
        """Mean over the seeds, one for each query."""
        return [mean(losses) for losses in zip(*self.losses, strict=True)]


@dataclass(frozen=True)
class Proof:
    """The same training thrice: on all rows, without random ones, without the queries' top ones.

    Attributes:
        queries: Ids of the queries, in the order of the arms' losses.
        full, random, top: The arms; all have the same number of seeds.
        note: One more sentence below the numbers.
    """

    queries: Sequence[str]
    full: Arm
    random: Arm
    top: Arm
    note: str = ""

    def raises(self, arm: Arm) -> list[float]:
        """By how much the mean query loss of `arm` exceeds that of `full`, one number for each seed."""
        return [after - before for after, before in zip(arm.means(), self.full.means(), strict=True)]

    def holds(self) -> bool:
        """Whether removing the top rows raises the loss by more than removing random ones, beyond the spread.

        With several seeds: the smallest raise of the top arm exceeds the largest of the random arm, which no overlap
        of the two spreads survives. With one seed there is no spread and the two raises are compared as they are.
        """
        return min(self.raises(self.top)) > max(self.raises(self.random))


@dataclass(frozen=True)
class Report:
    """Everything on the page; parts that are empty or None are left out.

    Attributes:
        title: Heading.
        summary: One paragraph below it.
        answers: The queries.
        score: How the rows were scored, in a few words ("l-RelatIF").
        providers: Sources by value, highest first.
        provider_noun: What a source is here ("module").
        proof: The retrainings.
        facts: Groups of (name, value) pairs: model, store, time, versions.
    """

    title: str
    summary: str
    answers: Sequence[Answer] = ()
    score: str = ""
    providers: Sequence[Provider] = ()
    provider_noun: str = "source"
    proof: Proof | None = None
    facts: Sequence[tuple[str, Sequence[tuple[str, str]]]] = field(default_factory=tuple)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None where there is one value only."""
    return stdev(values) if len(values) > 1 else None
