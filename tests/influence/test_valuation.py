"""The value table: it adds up, its shares mean what they say, and its errors come from the spread."""

import pytest
import torch

from logra_kernels import influence
from logra_kernels.errors import LograError

SCORES = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 0.5]])
SOURCES = ["news", "web", "news", "books"]


def test_the_table_adds_up_and_says_what_it_means():
    table = influence.value(SCORES, SOURCES)
    table.check()
    assert table.total == pytest.approx(3.0)
    assert table.residual == pytest.approx(0.0, abs=1e-12)
    news, books, web = table.lines
    assert [line.source for line in table.lines] == ["news", "books", "web"]
    assert (news.rows, news.value, news.per_row, news.error) == (2, 3.0, 1.5, None)
    assert (web.value, books.value) == (-1.0, 1.0)
    assert sum(line.share for line in table.lines) == pytest.approx(1.0)
    assert [line.positive_share for line in table.lines] == pytest.approx([0.75, 0.25, 0.0])
    assert table.by_query.tolist() == [[4.0, -1.0], [0.5, 0.5], [-2.0, 1.0]]
    assert "news" in str(table)
    assert "75.0%" in str(table)


def test_it_is_the_shapley_value_of_the_additive_game():
    def worth(providers):
        return sum(float(SCORES[:, i].sum()) for i, s in enumerate(SOURCES) if s in providers)

    from itertools import permutations

    orders = list(permutations(set(SOURCES)))
    for line in influence.value(SCORES, SOURCES).lines:
        gains = [worth(o[: o.index(line.source) + 1]) - worth(o[: o.index(line.source)]) for o in orders]
        assert line.value == pytest.approx(sum(gains) / len(orders))


def test_error_bars_over_projection_seeds():
    seeds = [SCORES + 0.1 * torch.randn(2, 4) for _ in range(5)]
    table = influence.value(seeds, SOURCES)
    for line in table.lines:
        mine = torch.tensor([s == line.source for s in SOURCES])
        values = torch.stack([s[:, mine].double().sum() for s in seeds])
        assert line.value == pytest.approx(float(values.mean()))
        assert line.error == pytest.approx(float(values.std() / 5**0.5))
    table.check()


def test_left_out_rows_and_nothing_positive():
    scores = -SCORES.abs()
    scores[:, 1] = torch.nan
    with pytest.raises(ValueError, match="same mask as rows="):
        influence.value(scores, SOURCES)
    table = influence.value(scores, SOURCES, rows=torch.tensor([True, False, True, True]))
    assert sorted(str(line.source) for line in table.lines) == ["books", "news"]
    assert all(line.positive_share != line.positive_share for line in table.lines)


def test_bad_input():
    with pytest.raises(ValueError, match="3 sources for 4 scored rows"):
        influence.value(SCORES, SOURCES[:3])
    with pytest.raises(ValueError, match="all of one size"):
        influence.value([SCORES, SCORES[:1]], SOURCES)
    with pytest.raises(ValueError, match="must be .Q, N."):
        influence.value([], SOURCES)
    table = influence.ValueTable(influence.value(SCORES, SOURCES).lines, 4.0, torch.zeros(0))
    with pytest.raises(LograError, match="add up to 3, not to 4"):
        table.check()
