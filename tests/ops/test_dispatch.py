import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import logra_kernels as lk
from logra_kernels.ops import _dispatch

USE = "import torch, warnings, logra_kernels as lk; one = torch.ones(2, 2); "
NOT_BUILT = "import sys; sys.modules['logra_kernels._C'] = None; "


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOGRA_KERNELS_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def test_backends_says_what_is_used_and_why():
    found = lk.backends()
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    assert {(b.op, b.device) for b in found} == {(op, device) for op in _dispatch.OPS for device in devices}
    for op in _dispatch.OPS:
        for device in devices:
            chosen = [b for b in found if (b.op, b.device) == (op, device) and b.chosen]
            assert len(chosen) == 1
            assert chosen[0].available
    assert all(b.why for b in found)
    assert {b.name for b in found if b.available} >= {"reference"}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_every_backend_named_can_be_loaded(op):
    for backend in lk.backends():
        if backend.op == op and backend.available:
            assert callable(_dispatch.launcher(op, backend.device, backend.name))


def test_without_the_native_library_it_warns_once_and_works():
    code = NOT_BUILT + USE + "[lk.score_block(one, one) for _ in range(3)]; lk.project_rows(one, one); print('done')"
    ran = python(code)
    assert ran.stdout == "done\n"
    assert ran.stderr.count("FallbackWarning") == 1
    assert "logra_kernels._C is not built" in ran.stderr


def test_without_the_native_library_asking_for_it_raises():
    code = NOT_BUILT + USE + "lk.score_block(one, one, backend='cpp')"
    ran = python(code)
    assert ran.returncode != 0
    assert "RuntimeError: score_block: backend 'cpp' is not available here: logra_kernels._C is not built" in ran.stderr
    assert "(have: reference)" in ran.stderr


def test_without_its_interpreter_triton_refuses_cpu_tensors():
    ran = python(USE + "lk.score_block(one, one, backend='triton')")
    assert "RuntimeError: score_block: backend 'triton' is not available here" in ran.stderr
    assert "TRITON_INTERPRET" in ran.stderr


def test_cuda_kernels_are_not_for_devices_of_little_shared_memory(monkeypatch):
    consumer = SimpleNamespace(name="RTX", major=8, minor=9, shared_memory_per_block_optin=99 << 10)
    large = SimpleNamespace(name="A100", major=8, minor=0, shared_memory_per_block_optin=163 << 10)
    why = _dispatch.cuda_error.__wrapped__
    monkeypatch.setitem(sys.modules, "logra_kernels._C_cuda", SimpleNamespace())
    for devices, named in (((), None), ((large,), None), ((large, consumer), "cuda:1, RTX, gives a block 99 KiB")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))  # noqa: B023
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: devices[i])  # noqa: B023
        assert why() is None if named is None else named in why()


def test_importing_the_package_loads_no_kernel_and_no_compiler():
    code = "import sys, logra_kernels; print([m for m in sys.modules if m in ('triton', 'logra_kernels._C')])"
    assert python(code).stdout == "[]\n"


def test_environment_forces_a_backend():
    code = USE + "warnings.simplefilter('error'); lk.score_block(one, one)"
    code += "; print({(b.name, b.why) for b in lk.backends() if b.chosen and b.device == 'cpu'})"
    ran = python(NOT_BUILT + code, LOGRA_KERNELS_BACKEND="reference")
    assert ran.stdout == "{('reference', 'LOGRA_KERNELS_BACKEND')}\n", ran.stderr
    forced = python(NOT_BUILT + USE + "lk.score_block(one, one)", LOGRA_KERNELS_BACKEND="cpp")
    assert "RuntimeError: score_block: backend 'cpp' is not available here" in forced.stderr


def test_environment_does_not_override_a_backend_asked_for():
    code = USE + "lk.score_block(one, one, backend='reference'); print('done')"
    assert python(code, LOGRA_KERNELS_BACKEND="cpp").stdout == "done\n"


def test_environment_with_an_unknown_backend_raises():
    ran = python(USE + "lk.score_block(one, one)", LOGRA_KERNELS_BACKEND="fastest")
    assert ran.returncode != 0
    assert "RuntimeError: score_block: backend 'fastest' is not available here: no such implementation" in ran.stderr


def test_the_dispatcher_is_left_out_only_where_nobody_listens():
    x, p = torch.randn(2, 3, 8), torch.randn(4, 8)

    def call():
        lk.project_rows(x, p)
        lk.project_grad(x, x, None, p)

    with torch.profiler.profile() as profile:
        call()
    assert {"logra_kernels::project_rows", "logra_kernels::project_grad"} <= {e.key for e in profile.key_averages()}
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Listen():
        call()
    assert seen == ["logra_kernels.project_rows.default", "logra_kernels.project_grad.default"]
    mapped = torch.func.vmap(lambda row: lk.project_rows(row[None], p)[0])(x)
    torch.testing.assert_close(mapped, lk.project_rows(x, p))
