"""The native library by itself: instruction sets forced in turn, and what its bindings refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("logra_kernels._C", reason="no C++ compiler when the package was installed")

F32, F64 = 0, 3
NOWHERE = 0  # an address that no test lets the library reach

# Run in a process of its own, because the choice of an instruction set is made once.
AGREES_WITH_THE_REFERENCE = """
import os
import torch
import logra_kernels as lk
from logra_kernels import _C

torch.manual_seed(0)
assert _C.isa() == os.environ["LOGRA_KERNELS_ISA"]

def same(got, want, dtype):
    scale = want.abs().max().clamp_min(1)
    assert (got - want).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5) * scale, (dtype, got, want)

def view(*shape, dtype):
    return torch.randn(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 2 : 2 + shape[-1]]

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = lambda t: t.to(acc)
    x, dy = view(3, 37, 301, dtype=dtype), view(3, 37, 47, dtype=dtype)
    p_in, p_out = view(19, 301, dtype=dtype), view(35, 47, dtype=dtype)
    weights = torch.rand(3, 37, dtype=acc).sub(0.3).clamp_min(0)
    q, rows = view(5, 301, dtype=dtype), view(70, 301, dtype=dtype)
    got, want = (
        lk.project_grad(*v, None, weights, backend=b)
        for v, b in (((x, dy, p_in, p_out), "cpp"), (map(wide, (x, dy, p_in, p_out)), "reference"))
    )
    if dtype == torch.bfloat16:  # projected positions may be rounded to it
        rounded = lk.project_grad(x, dy, p_in, p_out, None, weights, backend="reference")
        assert (got - want).norm() <= 1.1 * (rounded - want).norm()
    else:
        same(got, want, dtype)
    a, b = x[..., :19], dy[..., :35]  # projected already: rounded are the numbers that were
    same(
        lk.project_grad(a, b, None, None, None, None, backend="cpp"),
        lk.project_grad(wide(a), wide(b), None, None, None, None, backend="reference"),
        dtype,
    )
    same(
        lk.project_rows(x, p_in, backend="cpp"), lk.project_rows(wide(x), wide(p_in), backend="reference"), dtype
    )
    scores = lk.score_block(wide(q), wide(rows), backend="reference")
    same(lk.score_block(q, rows, backend="cpp"), scores, dtype)
    values, index = lk.score_topk(q, rows, 7, backend="cpp")
    same(values, scores.topk(7).values, dtype)
    same(values, scores.gather(1, index), dtype)
    got, want = torch.zeros(301, 301, dtype=acc), torch.zeros(301, 301, dtype=acc)
    lk.accumulate_gram(rows, got, backend="cpp")
    lk.accumulate_gram(wide(rows), want, backend="reference")
    same(got, want, dtype)
    assert torch.equal(got, got.T)
    for count in (1, 7, 64, 128):  # few rows of whole vectors are added where `out` lies
        few = torch.randn(count, 192, dtype=dtype)
        got, want = torch.ones(192, 192, dtype=acc), torch.ones(192, 192, dtype=acc)
        lk.accumulate_gram(few, got, backend="cpp")
        lk.accumulate_gram(wide(few), want, backend="reference")
        same(got, want, dtype)
        assert torch.equal(got, got.T)
    layers = [(17, 9), (4, 37)]
    for rank, count in ((1, 5), (3, 5), (3, 20)):
        q, factors = view(count, 301, dtype=dtype), view(70, rank * 67, dtype=dtype)
        want = lk.score_factored(wide(q), wide(factors), layers, rank, backend="reference")
        same(lk.score_factored(q, factors, layers, rank, backend="cpp"), want, dtype)
    rows = view(70, 301, dtype=dtype)
    errors = [
        (lk.rebuild_rows(lk.factor_rows(rows, layers, 2, backend=b), layers, 2) - rows).square().sum()
        for b in ("cpp", "reference")
    ]
    assert errors[0] <= 1.001 * errors[1]

every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(-1, 1)
every_half = every_half[every_half.isfinite().all(1)]
one = torch.ones(1, 1, dtype=torch.float16)
assert torch.equal(lk.project_rows(every_half, one, backend="cpp"), every_half.float())

bits = torch.randint(-(2**31), 2**31, (4096, 1), dtype=torch.int32)
bits[:2048] = bits[:2048] & -(2**16) | 0x8000  # ties
numbers = bits.view(torch.float32)
numbers = numbers[(numbers.abs() > 1e-30) | (numbers == 0) | numbers.isnan()].unsqueeze(-1)
for columns in (1, 9):  # few and many
    rounded = lk.project_rows(numbers, torch.ones(columns, 1).bfloat16(), backend="cpp")
    want = numbers.bfloat16().float().expand(-1, columns)
    assert torch.equal(rounded.isnan(), want.isnan())
    assert torch.equal(rounded[~want.isnan()], want[~want.isnan()])
"""

# Sizes on both sides of every edge: lanes, pairs, register tiles, panels, strips, few columns and many.
IS_EXACT_FOR_ANY_THREAD_COUNT = """
import random
import torch
import logra_kernels as lk
from tolerance import assert_as_good_as_naive

random.seed(1)
torch.manual_seed(1)

def threads_agree(f):
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(f())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    return found[0]

def draw(rows, d, dtype):
    kind = random.choice(("contiguous", "wide", "transposed", "odd"))
    if kind == "transposed":
        return torch.randn(d, rows).to(dtype).T
    whole = torch.full((rows + 1, 2 * d + 5), float("nan"), dtype=dtype)
    views = {"wide": whole[1:, 3 : 3 + d], "odd": whole[1:, : 2 * d : 2]}
    view = views.get(kind, torch.empty(rows, d, dtype=dtype))
    return view.copy_(torch.randn(rows, d))

for _ in range(80):
    dtype = random.choice((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64))
    d = random.choice((1, 2, 15, 31, 33, 255, 257, 700, 1025, 2049, 8193, 16500))
    q, n = random.choice((1, 2, 3, 4, 5, 8, 9, 16, 33, 70)), random.choice((1, 3, 5, 16, 61, 200))
    queries, rows = draw(q, d, dtype), draw(n, d, dtype)
    if dtype != torch.float64 and random.random() < 0.3:
        queries = queries.float()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = threads_agree(lambda: lk.score_block(queries, rows, backend="cpp"))
    exact = queries.double() @ rows.double().T
    assert_as_good_as_naive(scores, exact, queries.to(wide) @ rows.to(wide).T)
    cut = random.randrange(n + 1)
    parts = [lk.score_block(queries, part, backend="cpp") for part in (rows[:cut], rows[cut:])]
    assert torch.equal(scores, torch.cat(parts, 1)), "the block changes the bits"
    values = threads_agree(lambda: lk.score_topk(queries, rows, 2, backend="cpp")[0])
    assert torch.equal(values, scores.topk(min(2, n)).values)
    p = queries.to(dtype)
    projected = threads_agree(lambda: lk.project_rows(rows, p, backend="cpp"))
    assert_as_good_as_naive(projected, rows.double() @ p.double().T, rows.to(wide) @ p.to(wide).T)
    if dtype == torch.float32:
        half = p.bfloat16()
        rounded = threads_agree(lambda: lk.project_rows(rows, half, backend="cpp"))
        assert torch.equal(rounded, lk.project_rows(rows.bfloat16(), half, backend="cpp")), "rounded as it is read"

    samples, t = random.choice((1, 3)), random.choice((1, 7, 130, 520))
    d_in, d_out = min(d, 2049), random.choice((3, 513))
    k_in, k_out = min(d_in, random.choice((1, 8, 17, 64))), min(d_out, random.choice((2, 16, 33)))
    x, dy = (draw(samples * t, size, dtype).unflatten(0, (samples, t)) for size in (d_in, d_out))
    args = [x, dy, draw(k_in, d_in, dtype), draw(k_out, d_out, dtype)]
    weights = torch.rand(samples, t, dtype=wide).sub(0.3).clamp_min(0) if random.random() < 0.5 else None
    got = threads_agree(lambda: lk.project_grad(*args, None, weights, backend="cpp"))
    exact_weights = None if weights is None else weights.double()
    exact = lk.project_grad(*(a.double() for a in args), None, exact_weights, backend="reference")
    held = dtype if dtype == torch.bfloat16 else wide  # projected positions may be rounded to bf16
    naive = lk.project_grad(*(a.to(held) for a in args), None, weights, backend="reference")
    assert_as_good_as_naive(got, exact, naive)
"""


def run(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LOGRA_KERNELS_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_the_floor_is_always_there():
    assert _C.isas()[0] == "base"
    assert _C.isa() == os.environ.get("LOGRA_KERNELS_ISA", _C.isas()[-1])


@pytest.mark.parametrize("isa", _C.isas())
def test_each_instruction_set_agrees_with_the_reference(isa):
    done = run(AGREES_WITH_THE_REFERENCE, isa)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", _C.isas())
def test_each_instruction_set_is_exact_for_any_thread_count(isa):
    done = run(f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})" + IS_EXACT_FOR_ANY_THREAD_COUNT, isa)
    assert done.returncode == 0, done.stderr


def test_bf16_instructions_are_used_where_there_are_any():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("v4bf16" in _C.isas()) == ("avx512_bf16" in flags and "v4" in _C.isas())
    assert ("v4amx" in _C.isas()) == ("amx_bf16" in flags and "v4bf16" in _C.isas())


def test_an_unknown_instruction_set_raises():
    done = run("from logra_kernels import _C; _C.isa()", "sse9")
    assert done.returncode != 0
    assert "ValueError: logra_kernels: LOGRA_KERNELS_ISA=sse9" in done.stderr
    assert f"have: {', '.join(_C.isas())}" in done.stderr


def test_an_unknown_instruction_set_is_never_ignored_by_an_op():
    code = "import torch, logra_kernels as lk; lk.project_rows(torch.ones(2, 3), torch.ones(1, 3), backend='cpp')"
    done = run(code, "sse9")
    assert done.returncode != 0
    assert "ValueError: logra_kernels: LOGRA_KERNELS_ISA=sse9" in done.stderr


def matrix(dtype: int = F32) -> tuple[int, int, int, int]:
    return NOWHERE, dtype, 1, 1


def positions(dtype: int = F32, inner: int = 1) -> tuple[int, int, int, int, int, int]:
    return NOWHERE, dtype, inner, 1, 1, 1


REFUSED = {
    "negative rows": (lambda: _C.project_rows(positions(), matrix(), NOWHERE, -1, 2, 2, 1), "-1 is negative"),
    "negative inner": (lambda: _C.project_rows(positions(inner=-2), matrix(), NOWHERE, 1, 2, 2, 1), "-2 is negative"),
    "negative d": (lambda: _C.accumulate_gram(matrix(), NOWHERE, 2, -3, 1), "-3 is negative"),
    "negative queries": (lambda: _C.score_block(matrix(), matrix(), NOWHERE, -4, 2, 2, 1), "-4 is negative"),
    "overflow": (lambda: _C.score_block(matrix(), matrix(), NOWHERE, 2**40, 2**40, 1, 1), "more than 2\\^63 bytes"),
    "no threads": (lambda: _C.score_block(matrix(), matrix(), NOWHERE, 1, 1, 1, 0), "0 threads"),
    "dtype code": (lambda: _C.accumulate_gram(matrix(9), NOWHERE, 2, 2, 1), "dtype code 9"),
    "mixed dtypes": (lambda: _C.score_block(matrix(F64), matrix(F32), NOWHERE, 1, 1, 1, 1), "fp64 does not mix"),
    "k beyond rows": (
        lambda: _C.score_topk(matrix(), matrix(), None, NOWHERE, NOWHERE, 1, 3, 2, 4, True, 1),
        "k 4 is not in 1..3",
    ),
    "k of 0": (
        lambda: _C.score_topk(matrix(), matrix(), None, NOWHERE, NOWHERE, 1, 3, 2, 0, True, 1),
        "k 0 is not in 1..3",
    ),
    "negative samples": (
        lambda: _C.project_grad(positions(), positions(), None, None, None, NOWHERE, NOWHERE, -1, 2, 2, 2, 2, 2, 2, 1),
        "-1 is negative",
    ),
    "d is not k": (
        lambda: _C.project_grad(positions(), positions(), None, None, None, NOWHERE, NOWHERE, 1, 2, 2, 3, 2, 2, 2, 1),
        "d 3 and k 2",
    ),
    "rows do not fit": (
        lambda: _C.project_grad(positions(), positions(), None, None, None, NOWHERE, NOWHERE, 1, 2, 3, 2, 2, 2, 2, 1),
        "samples \\* length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bindings_refuse_what_does_not_fit(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cuts", [[0, 3, 2], [-1, 2, 3], [0, 2, 4]], ids=str)
def test_project_grad_refuses_offsets_that_leave_the_rows(cuts):
    offsets = torch.tensor(cuts)
    with pytest.raises(ValueError, match="offsets must"):
        _C.project_grad(positions(), positions(), None, None, None, offsets.data_ptr(), NOWHERE, 2, 0, 3, 2, 2, 2, 2, 1)


def test_empty_sizes_touch_no_memory():
    _C.project_rows(positions(), matrix(), NOWHERE, 0, 5, 4, 2)
    _C.project_rows(positions(), matrix(), NOWHERE, 3, 5, 0, 2)
    _C.accumulate_gram(matrix(), NOWHERE, 0, 0, 2)
    _C.score_block(matrix(), matrix(), NOWHERE, 0, 9, 5, 2)
    _C.score_topk(matrix(), matrix(), None, NOWHERE, NOWHERE, 4, 0, 5, 0, True, 2)
    _C.project_grad(positions(), positions(), None, None, None, NOWHERE, NOWHERE, 0, 7, 0, 2, 2, 2, 2, 2)
