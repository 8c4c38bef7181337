import os
import subprocess
import sys

import pytest
import torch
from ops.views import VIEWS

import logra_kernels as lk
from logra_kernels import _C
from logra_kernels.ops import FORMATS
from logra_kernels.ops.quantize_rows import op

SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
# of one rounded code against the scale: half a step of an integer, a sixteenth of the largest e4m3 number
STEP = {"int8": 0.5, "int4": 0.5, "int2": 0.5, "fp8": 16.0}


@pytest.fixture(params=SCALED)
def name(request):
    return request.param


def rows(n=4, d=300, dtype=torch.float32, device="cpu"):
    spread = torch.logspace(-3, 3, n)[:, None]
    return (torch.randn(n, d) * spread * torch.rand(n, 1)).to(device, dtype)


def blocks_of(x, block):
    return torch.nn.functional.pad(x.double(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))


@pytest.mark.parametrize(("block", "scale"), [(64, "fp32"), (128, "fp16")])
def test_each_number_is_within_half_a_step(target, name, block, scale):
    g = rows(device=target.device)
    form = lk.RowFormat.of(name, block, scale)
    got = lk.quantize_rows(g, form, backend=target.backend)
    assert (got.codes.dtype, got.scales.dtype) == (form.code_dtype, form.scale_dtype)
    back = blocks_of(lk.dequantize_rows(got, backend="reference").cpu(), block)
    g, most = blocks_of(g.cpu(), block), blocks_of(g.cpu(), block).abs().amax(2, keepdim=True)
    if name == "sign":
        assert torch.equal(back[g != 0] > 0, g[g != 0] > 0)
        return
    assert ((back - g).abs() <= most * (STEP[name] / form.most + 2**-9)).all()


def test_a_sign_is_as_large_as_its_block_is_on_average(target):
    g = rows(device=target.device)
    got = lk.quantize_rows(g, lk.RowFormat.of("sign", 256), backend=target.backend)
    mean = blocks_of(g.cpu(), 256).abs().sum(2) / torch.tensor([256.0, 44.0])
    torch.testing.assert_close(got.scales.double().cpu(), mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("block", "scale"), [(64, "fp16"), (4096, "fp32")])
def test_the_same_bits_as_the_reference(kernel, name, rounding, block, scale):
    form = lk.RowFormat.of(name, block, scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g = rows(4, 333, dtype, kernel.device)
        g[2] = 0
        g[3] *= 1e-5
        options = {"rounding": rounding, "seed": 11, "first_row": 3}
        got = lk.quantize_rows(g, form, backend=kernel.backend, **options)
        wanted = lk.quantize_rows(g, form, backend="reference", **options)
        if kernel.backend == "triton" and name == "sign" and rounding == "nearest":
            torch.testing.assert_close(got.scales, wanted.scales, rtol=1e-5 if scale == "fp32" else 1e-3, atol=0)
        else:
            assert torch.equal(got.scales, wanted.scales)
        assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))


@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != _C.isa()])
def test_the_same_bits_in_every_instruction_set(tmp_path, isa):
    script = """
import sys, torch, logra_kernels as lk
torch.manual_seed(0)
g = torch.randn(6, 777)
found = [lk.quantize_rows(g, lk.RowFormat.of(name, 64), rounding=rounding, seed=5, backend="cpp")
         for name in ("fp8", "int8", "int4", "int2", "sign") for rounding in ("nearest", "stochastic")]
numbers = [lk.dequantize_rows(rows, backend="cpp") for rows in found]
torch.save([(r.codes.view(torch.uint8), r.scales, x) for r, x in zip(found, numbers)], sys.argv[1])
"""
    path = str(tmp_path / "found")
    subprocess.run([sys.executable, "-c", script, path], env=os.environ | {"LOGRA_KERNELS_ISA": isa}, check=True)
    torch.manual_seed(0)
    g = torch.randn(6, 777)
    cases = [(name, rounding) for name in SCALED for rounding in ("nearest", "stochastic")]
    for (name, rounding), (codes, scales, numbers) in zip(cases, torch.load(path), strict=True):
        here = lk.quantize_rows(g, lk.RowFormat.of(name, 64), rounding=rounding, seed=5, backend="cpp")
        assert torch.equal(here.codes.view(torch.uint8), codes)
        assert torch.equal(here.scales, scales)
        assert torch.equal(lk.dequantize_rows(here, backend="cpp"), numbers)


def test_stochastic_rounding_is_right_on_average(target, name):
    block = torch.randn(128, device=target.device)
    got = lk.quantize_rows(block.repeat(2, 50), name, rounding="stochastic", seed=7, backend=target.backend)
    back = lk.dequantize_rows(got, backend="reference").double().view(-1, 128)
    step = got.scales[0, 0].item() * 2 * STEP.get(name, 1.0)
    assert ((back.mean(0) - block).abs() <= 5 * step / 2 / 100**0.5).all()
    assert back.std(0).max() > 0


def test_chances_do_not_depend_on_the_batch_but_on_the_seed(target, name):
    g = rows(9, 300, device=target.device)
    options = {"rounding": "stochastic", "backend": target.backend}
    whole = lk.quantize_rows(g, name, seed=1, **options)
    parts = [lk.quantize_rows(g[i : i + 4], name, seed=1, first_row=i, **options) for i in range(0, 9, 4)]
    assert torch.equal(whole.codes.view(torch.uint8), torch.cat([part.codes for part in parts]).view(torch.uint8))
    other = lk.quantize_rows(g, name, seed=2, **options)
    assert not torch.equal(whole.codes.view(torch.uint8), other.codes.view(torch.uint8))


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, name, view):
    g = rows(5, 333, device=target.device)
    got, wanted = (lk.quantize_rows(x, name, backend=target.backend) for x in (VIEWS[view](g), g))
    assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_empty_and_tiny(target, name, shape):
    got = lk.quantize_rows(torch.ones(shape, device=target.device), name, backend=target.backend)
    assert got.shape == shape
    assert torch.equal(lk.dequantize_rows(got, backend=target.backend), torch.ones(shape, device=target.device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(target, name, bad):
    g = rows(3, 300, device=target.device)
    g[1, 140] = bad
    back = lk.dequantize_rows(lk.quantize_rows(g, name, backend=target.backend), backend=target.backend)
    assert back[1, 128:256].isnan().all()
    assert back.isnan().sum() == 128


def test_same_bits_for_any_thread_count(name, threads):
    g = rows(301, 900)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(lk.quantize_rows(g, name, backend="cpp"))
    assert all(torch.equal(found[0].codes.view(torch.uint8), other.codes.view(torch.uint8)) for other in found[1:])


def test_formats_without_scales_are_casts():
    g = rows(3, 50)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        got = lk.quantize_rows(g, name)
        assert got.scales is None
        assert torch.equal(got.codes, g.to(dtype))


def test_registration(device):
    g = rows(4, 200, device=device)
    torch.library.opcheck(op._op, (g, "int4", 64, "fp16", "stochastic", 3, 1, "auto"))


def test_bad_input_raises():
    g = rows(3, 50)
    with pytest.raises(ValueError, match=r"quantize_rows: g \(50,\) must be \[N, D\]"):
        lk.quantize_rows(g[0], "int8")
    with pytest.raises(ValueError, match="format 'int7' is not one of"):
        lk.quantize_rows(g, "int7")
    with pytest.raises(ValueError, match="quantize_rows: rounding 'up'"):
        lk.quantize_rows(g, "int8", rounding="up")
    with pytest.raises(ValueError, match="stochastic rounding is for formats with scales, not for bf16"):
        lk.quantize_rows(g, "bf16", rounding="stochastic")
    with pytest.raises(ValueError, match="quantize_rows: g is torch.int8"):
        lk.quantize_rows(g.to(torch.int8), "int8")
    form = lk.RowFormat.of("int4")
    with pytest.raises(ValueError, match=r"codes \(3, 25\) torch.int8 must be \(3, 25\) torch.uint8"):
        lk.EncodedRows(form, 50, torch.zeros(3, 25, dtype=torch.int8), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="take codes and scales; given are codes"):
        lk.EncodedRows(form, 50, torch.zeros(3, 25, dtype=torch.uint8))
