"""Triton kernel: one program a run of a row's numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._codes import as_bytes, converts_f8, field_of, number_of
from logra_kernels.ops._device import device_of
from logra_kernels.ops._format import EncodedRows

RUN = 1024


@triton.jit
def _dequantize_rows_kernel(
    codes, scales, out,
    D, stride_cn, stride_cd, stride_sn, stride_sd,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, CONVERTS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out[n,d] = scales[n, d // BLOCK] codes[n,d]"""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * RUN + tl.arange(0, RUN)
    ok = d < D
    byte = tl.load(codes + n * stride_cn + (d // EACH).to(tl.int64) * stride_cd, mask=ok, other=0)
    scale = tl.load(scales + n * stride_sn + (d // BLOCK).to(tl.int64) * stride_sd, mask=ok, other=0.0)
    tl.store(out + n * D + d, number_of(field_of(byte, d, CODE), CODE, CONVERTS) * scale.to(tl.float32), mask=ok)


def launch(rows: EncodedRows) -> Tensor:
    (n, d), form = rows.shape, rows.format
    out = torch.empty((n, d), dtype=torch.float32, device=rows.device)
    if not out.numel() or rows.scales is None:
        return out
    with device_of(rows.codes):
        _dequantize_rows_kernel[n, triton.cdiv(d, RUN)](
            as_bytes(rows.codes), rows.scales, out, d, *rows.codes.stride(), *rows.scales.stride(),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block, CONVERTS=converts_f8(rows.codes),
            RUN=RUN, num_warps=4,
        )  # fmt: skip
    return out
