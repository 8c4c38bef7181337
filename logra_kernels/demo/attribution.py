"""Log every training passage, then ask which of them taught the model what the queries say."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from logra_kernels.demo.corpus import Passage
from logra_kernels.demo.model import END
from logra_kernels.integrations import causal_lm
from logra_kernels.projection import Projection
from logra_kernels.run import Run

_BATCH = 16
_SAMPLE = 256  # passages that the projection is learned from


@dataclass(frozen=True)
class Found:
    """What the store says about Q queries; rows are numbers in the corpus's list of training passages.

    Attributes:
        ranking: The scores that order the passages, [Q, N].
        influence: The influences on each query's loss a token, which add up over rows and queries, [Q, N].
        layers: Number of tapped layers.
        dim: Length of a stored row.
    """

    ranking: Tensor
    influence: Tensor
    layers: int
    dim: int

    def top(self, query: int, count: int) -> list[int]:
        """Rows of highest score, highest first."""
        return self.ranking[query].argsort(descending=True, stable=True)[:count].tolist()

    def opposing(self, query: int, count: int) -> list[int]:
        """Rows of lowest score, lowest first."""
        return self.ranking[query].argsort(stable=True)[:count].tolist()

    def top_union(self, count: int) -> list[int]:
        """Every row that is among the top `count` of some query."""
        return sorted({row for query in range(len(self.ranking)) for row in self.top(query, count)})

    def value_by_source(self, passages: Sequence[Passage]) -> list[tuple[str, int, float]]:
        """(source, its rows, sum of influence over its rows and all queries), highest value first."""
        rows = Counter(passage.source for passage in passages)
        value = dict.fromkeys(rows, 0.0)
        for passage, influence in zip(passages, self.influence.double().sum(0).tolist(), strict=True):
            value[passage.source] += influence
        return sorted(((name, rows[name], value[name]) for name in rows), key=lambda entry: -entry[2])


def log(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    passages: Sequence[Passage],
    projection: Projection,
    max_length: int,
    progress: Callable[..., Any] | None = None,
) -> Run:
    """Write one projected gradient a passage into the store at `path`, and its curvature and self-influence."""
    run = Run(path, model, projection=projection)
    # Passages of like length share a batch, which keeps the padding small; the store's order is free.
    order = sorted(passages, key=lambda passage: (len(passage.text), passage.id))
    sample = order[:: max(1, len(order) // _SAMPLE)]
    bar = progress(total=len(sample) + len(order), unit="row") if progress else None
    for rows, batch in _batches(sample, tokenizer, max_length):
        with run.observe(weights=batch.attention_mask):
            causal_lm.loss_sum(model, batch).backward()
        if bar is not None:
            bar.update(len(rows))
    for rows, batch in _batches(order, tokenizer, max_length):
        ids = [row.id for row in rows]
        columns = {"text": [row.text for row in rows], "source": [row.source for row in rows]}
        with run.log(ids=ids, columns=columns):
            causal_lm.loss_sum(model, batch).backward()
        if bar is not None:
            bar.update(len(rows))
    if bar is not None:
        bar.close()
    run.finalize()
    return run


def _batches(
    order: Sequence[Passage], tokenizer: Any, max_length: int
) -> Iterator[tuple[Sequence[Passage], causal_lm.Batch]]:
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        # The loss of training: the mark of the end was predicted as well.
        texts = [row.text + END for row in rows]
        yield rows, causal_lm.encode(tokenizer, texts, max_length=max_length, ids=[row.id for row in rows])


def ask(run: Run, model: nn.Module, asked: causal_lm.Batch, passages: Sequence[Passage]) -> Found:
    """Score every passage for every query."""
    with run.query(ids=list(asked.ids)) as query:
        causal_lm.loss_sum(model, asked).backward()
    # A query counts by its mean loss, as in the proof; by its summed loss the longest would outweigh the others.
    tokens = (asked.labels != causal_lm.IGNORED).sum(dim=1, keepdim=True)
    order = run.store.numbers_of([passage.id for passage in passages])
    return Found(
        ranking=run.scores(query, mode="relatif")[:, order],
        influence=run.scores(query, mode="dot")[:, order] / tokens,
        layers=len(run.store.layers),
        dim=run.store.dim,
    )
