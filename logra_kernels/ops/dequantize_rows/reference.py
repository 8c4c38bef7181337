"""The definition of dequantize_rows. Runs on any device; each number is one fp32 product of its code and scale."""

import torch
from torch import Tensor

from logra_kernels.ops._format import EncodedRows


def dequantize_rows(rows: EncodedRows) -> Tensor:
    """[N, D] fp32."""
    numbers = _unpack(rows) if rows.format.bits < 8 else rows.codes.float()
    if rows.scales is None:
        return numbers
    return numbers * rows.scales.float().repeat_interleave(rows.format.block or 1, dim=1)[:, : rows.dim]


def _unpack(rows: EncodedRows) -> Tensor:
    bits = rows.format.bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    fields = ((rows.codes.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, : rows.dim].float()
    return fields * 2 - 1 if rows.format.name == "sign" else fields - (1 << (bits - 1))
