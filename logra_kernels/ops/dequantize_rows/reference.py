"""The definition of dequantize_rows. Runs on any device; each number is one fp32 product of its code and scale."""

import torch
from torch import Tensor

from logra_kernels.ops._format import RowFormat


def dequantize_rows(codes: Tensor, scales: Tensor | None, dim: int, form: RowFormat) -> Tensor:
    """[N, dim] fp32."""
    numbers = _unpack(codes, dim, form) if form.bits < 8 else codes.float()
    if scales is None or not form.scaled:
        return numbers
    return numbers * scales.float().repeat_interleave(form.block or 1, dim=1)[:, :dim]


def _unpack(codes: Tensor, dim: int, form: RowFormat) -> Tensor:
    shifts = torch.arange(0, 8, form.bits, dtype=torch.uint8, device=codes.device)
    fields = ((codes.unsqueeze(-1) >> shifts) & ((1 << form.bits) - 1)).flatten(1)[:, :dim].float()
    return fields * 2 - 1 if form.name == "sign" else fields - (1 << (form.bits - 1))
