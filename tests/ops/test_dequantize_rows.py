import importlib

import pytest
import torch

import logra_kernels as lk
from logra_kernels.ops import FORMATS
from logra_kernels.ops.dequantize_rows import op

SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]


@pytest.fixture(params=SCALED)
def name(request):
    return request.param


def every_code(name, block=32, scale="fp32", device="cpu"):
    """Rows of random bytes, which hold every code, and random scales."""
    form, d = lk.RowFormat.of(name, block, scale), 771
    codes = torch.randint(0, 256, (9, form.code_width(d)), dtype=torch.uint8).view(form.code_dtype)
    scales = torch.rand(9, form.scale_width(d)).to(form.scale_dtype)
    return lk.EncodedRows(form, d, codes.to(device), scales.to(device))


@pytest.mark.parametrize("block", [32, 128, 1024])
@pytest.mark.parametrize("scale", ["fp32", "fp16"])
def test_the_same_bits_as_the_reference(kernel, name, block, scale):
    rows = every_code(name, block, scale, kernel.device)
    got, wanted = lk.dequantize_rows(rows, backend=kernel.backend), lk.dequantize_rows(rows, backend="reference")
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert wanted.isnan().any() == (name == "fp8")


def test_codes_that_a_gpu_converts_itself(monkeypatch):
    """All but NaN, which Triton's interpreter takes for 480."""
    triton = pytest.importorskip("logra_kernels.ops.dequantize_rows.triton")
    if not importlib.import_module("logra_kernels.ops._tile").INTERPRETED:
        pytest.skip("GPUs that have the instructions use them in the other tests")
    monkeypatch.setattr(triton, "converts_f8", lambda codes: True)
    rows = every_code("fp8")
    codes = rows.codes.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    assert torch.equal(lk.dequantize_rows(rows, backend="triton"), lk.dequantize_rows(rows, backend="reference"))


@pytest.mark.parametrize(
    ("name", "byte", "numbers"),
    [
        ("int8", 0x81, [-127]),
        ("int4", 0x1F, [7, -7]),
        ("int2", 0b10_01_11_10, [0, 1, -1, 0]),
        ("sign", 0b1000_0101, [1, -1, 1, -1, -1, -1, -1, 1]),
        ("fp8", 0xFE, [-448]),
        ("fp8", 0x01, [2**-9]),
    ],
)
def test_layout(target, name, byte, numbers):
    form = lk.RowFormat.of(name)
    codes = torch.tensor([[byte]], dtype=torch.uint8, device=target.device).view(form.code_dtype)
    rows = lk.EncodedRows(form, len(numbers), codes, torch.tensor([[2.0]], device=target.device))
    assert lk.dequantize_rows(rows, backend=target.backend).tolist() == [[2.0 * number for number in numbers]]


def test_views_of_rows(target, name):
    rows = every_code(name, device=target.device)
    whole = lk.dequantize_rows(rows, backend=target.backend)
    mask = torch.tensor([True, False, True] * 3, device=target.device)
    for part in (slice(2, 7), slice(1, None, 3), mask):
        got = lk.dequantize_rows(rows[part], backend=target.backend)
        torch.testing.assert_close(got, whole[part], rtol=0, atol=0, equal_nan=True)


def test_columns_that_are_not_neighbours(target, name):
    rows = every_code(name, device=target.device)
    apart = lk.EncodedRows(rows.format, rows.dim, rows.codes.T.contiguous().T, rows.scales.T.contiguous().T)
    got, wanted = (lk.dequantize_rows(r, backend=target.backend) for r in (apart, rows))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_formats_without_scales(name):
    g = torch.randn(3, 40)
    rows = lk.quantize_rows(g, name)
    assert torch.equal(lk.dequantize_rows(rows), g.to(rows.codes.dtype).float())


def test_registration(device):
    rows = every_code("int4", device=device)
    torch.library.opcheck(op._op, (rows.codes, rows.scales, rows.dim, "int4", 32, "fp32", "auto"))
