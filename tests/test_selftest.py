import importlib

import pytest
import torch

from logra_kernels import ops, selftest
from logra_kernels.ops import _dispatch


@pytest.fixture
def fresh_choice():
    """Launchers are cached by op, device and name."""
    _dispatch.launcher.cache_clear()
    yield
    _dispatch.launcher.cache_clear()


def test_every_backend_here_is_right():
    checks = selftest.run()
    assert [check for check in checks if check.failed] == []
    here = {(b.op, b.device, b.name) for b in ops.backends() if b.available}
    assert {(c.op, c.device, c.backend) for c in checks if c.status == "ok"} == here
    assert sum(check.status == "ok" for check in checks) == len(here) * len(selftest.DTYPES)


def zeros(x, p):
    return torch.zeros(*x.shape[:2], p.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def a_little_wrong(x, p):
    return torch.einsum("ntd,kd->ntk", x.double(), p.double() * 1.1).to(zeros(x, p).dtype)


def nan(x, p):
    return zeros(x, p) * float("nan")


def raising(x, p):
    raise RuntimeError("no such instruction\nsecond line")


@pytest.mark.parametrize(
    ("broken", "why"),
    [(zeros, "all zeros"), (a_little_wrong, "wrong numbers"), (nan, "wrong numbers"), (raising, "no such instruction")],
)
def test_a_broken_backend_is_caught(monkeypatch, fresh_choice, broken, why):
    reference = importlib.import_module("logra_kernels.ops.project_rows.reference")
    monkeypatch.setattr(reference, "project_rows", broken)
    some = [b for b in ops.backends() if b.op == "project_rows" or (b.op, b.name) == ("score_block", "reference")]
    monkeypatch.setattr(ops, "backends", lambda: some)
    checks = selftest.run(seed=7)
    failed = [check for check in checks if check.failed]
    assert {(c.op, c.backend, c.device) for c in failed if c.device == "cpu"} == {("project_rows", "reference", "cpu")}
    assert {c.dtype for c in failed} == {"float32", "bfloat16", "float16", "float64"}
    assert all(why in c.why and "(seed 7)" in c.why for c in failed)
    assert "FAIL: " in selftest.render(checks)


def test_table():
    checks = [
        selftest.Check("project_rows", "cpp", "cpu", "float32", 1.25e-7, 5e-7, "ok"),
        selftest.Check("project_rows", "triton", "cpu", "", None, None, "not here", "no GPU"),
    ]
    assert selftest.render(checks).splitlines() == [
        "op            backend  device  dtype    relative error  allowed",
        "project_rows  cpp      cpu     float32  1.2e-07         5.0e-07  ok",
        "project_rows  triton   cpu                                       not here: no GPU",
        "",
        "1 ok, 0 failed, 1 not here",
    ]
