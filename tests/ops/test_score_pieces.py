"""Scores of few tiles, whose sums over D are cut into pieces so that a GPU's processors all have work."""

import pytest
import torch
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops import FORMATS, _best

_score = pytest.importorskip("logra_kernels.ops._score")
TRITON = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
D = 5000


@pytest.fixture(params=TRITON)
def device(request):
    return request.param


@pytest.fixture
def cuts(monkeypatch):
    """The grids of the scores taken in the test, on a device of 24 programs."""
    grids, cut = [], _score._cut

    def noted(*args):
        piece, grid = cut(*args)
        grids.append(grid)
        return piece, grid

    monkeypatch.setattr(_score, "programs_of", lambda rows: 24)
    monkeypatch.setattr(_score, "_cut", noted)
    return grids


def rows_in(name, n, device):
    form, numbers = lk.RowFormat.of(name), torch.randn(n, D, device=device)
    return lk.quantize_rows(numbers, form) if form.scaled else numbers.to(form.code_dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("query_format", [None, "int8"])
def test_pieces_add_up(cuts, device, name, query_format):
    rows = rows_in(name, 9, device)
    if query_format and isinstance(rows, torch.Tensor):
        pytest.skip("queries of rows without scales keep their numbers")
    queries = torch.randn(3, D, device=device)
    numbers = rows.float() if isinstance(rows, torch.Tensor) else lk.dequantize_rows(rows)
    asked = queries
    if query_format == "int8":
        asked = lk.dequantize_rows(lk.quantize_rows(queries, "int8"))
    got = lk.score_block(queries, rows, query_format=query_format, backend="triton")
    assert_as_good_as_naive(got, asked.double() @ numbers.double().T, asked @ numbers.T)
    assert [grid[1] > 1 for grid in cuts] == [True]


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_blocks_of_rows_are_cut_alike(cuts, device, name, monkeypatch):
    """So that equal rows of a long block and of the short last one have equal scores, which their numbers decide."""
    monkeypatch.setattr(_best, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(_best, "LEAST_BLOCK", 100)
    lk.score_topk(torch.randn(2, D, device=device), rows_in(name, 101, device), 5, backend="triton")
    assert len(cuts) == 2
    assert cuts[0][1] == cuts[1][1] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("q", "n", "d"), [(9, 300, 1304), (50, 130, 712), (130, 300, 200), (257, 40, 201)])
def test_tiles_of_an_architecture(cuts, device, dtype, capability, q, n, d, monkeypatch):
    """Also through descriptors, where rows are aligned, and cut into pieces of D where tiles are few."""
    if device == "cuda" and capability > torch.cuda.get_device_capability():
        pytest.skip("this GPU has no tensor descriptors")
    monkeypatch.setattr(_score, "capability_of", lambda rows: capability)
    queries, rows, scale = (torch.randn(*shape, device=device) for shape in ((q, d), (n, d), (n,)))
    queries, rows = queries.to(dtype), rows.to(dtype)
    exact = queries.double() @ rows.double().T * scale.double()
    got = _score.score(queries, rows, scale)
    assert_as_good_as_naive(got, exact, queries.float() @ rows.float().T * scale)
    assert len(cuts) == 1
    assert cuts[0][1] > 1 or d < 1000
    rows[-1], rows[:, -1] = float("nan"), 0
    queries[:, -1] = 0
    assert _score.score(queries, rows, scale)[:, :-1].isfinite().all()
