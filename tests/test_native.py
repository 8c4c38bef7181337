"""The native library by itself: instruction sets forced in turn, and what its bindings refuse."""

import os
import subprocess
import sys

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
    same(
        lk.project_grad(x, dy, p_in, p_out, None, weights, backend="cpp"),
        lk.project_grad(*map(wide, (x, dy, p_in, p_out)), None, weights, backend="reference"),
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

every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(-1, 1)
every_half = every_half[every_half.isfinite().all(1)]
one = torch.ones(1, 1, dtype=torch.float16)
assert torch.equal(lk.project_rows(every_half, one, backend="cpp"), every_half.float())
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
