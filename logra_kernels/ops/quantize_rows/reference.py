"""The definition of quantize_rows. Runs on any device; its codes and scales are the same bits as the C++ kernels'."""

import torch
from torch import Tensor

from logra_kernels.ops._format import RowFormat

LEAST_SCALE = torch.finfo(torch.float32).tiny  # the reciprocal of a smaller one may overflow: its block becomes zeros


def quantize_rows(
    g: Tensor, form: RowFormat, rounding: str = "nearest", seed: int = 0, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """(codes [N, code_width], scales [N, scale_width]; [N, 0] for a format without scales)."""
    if not form.scaled:
        return g.to(form.code_dtype).contiguous(), g.new_zeros((g.shape[0], 0), dtype=torch.float32)
    n, d = g.shape
    blocks = _blocks(g.float(), form)
    chance = _chance(n, blocks.shape[1] * blocks.shape[2], seed, first_row, g.device) if rounding != "nearest" else None
    scales = _scales(blocks, d, form, mean=chance is None and form.name == "sign").to(form.scale_dtype)
    scale = scales.float()
    usable = (scale >= LEAST_SCALE) & (scale < torch.inf)
    scaled = torch.where(usable.unsqueeze(-1), blocks * scale.reciprocal().unsqueeze(-1), 0.0).flatten(1)[:, :d]
    codes = _codes(scaled.clamp(-form.most, form.most), form, None if chance is None else chance[:, :d])
    return codes, torch.where(usable, scale, torch.where(scale < LEAST_SCALE, 0.0, torch.nan)).to(form.scale_dtype)


def _blocks(x: Tensor, form: RowFormat) -> Tensor:
    """[N, blocks, block], the last block of a row filled up with zeros."""
    block = form.block or 1
    return torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (form.scale_width(x.shape[1]), block))


def _scales(blocks: Tensor, d: int, form: RowFormat, mean: bool) -> Tensor:
    """[N, blocks] fp32: the largest magnitude over the largest code, or the mean magnitude, which has the least error
    of all scales of a sign."""
    size = blocks.abs()
    if not mean:
        return size.amax(2) / form.most
    while size.shape[2] > 1:  # in this order, which fixes the rounding
        half = size.shape[2] // 2
        size = size[:, :, :half] + size[:, :, half:]
    count = torch.full(blocks.shape[1:2], blocks.shape[2], dtype=torch.float32, device=blocks.device)
    count[-1:] = d - (blocks.shape[1] - 1) * blocks.shape[2]
    return size[:, :, 0] / count


def _chance(n: int, d: int, seed: int, first_row: int, device: torch.device) -> Tensor:
    """16 random bits for each number, [N, d] int64: a hash of the seed and the number's row and column."""
    row = _mix(torch.arange(first_row, first_row + n, device=device) ^ _mix(torch.tensor(seed, device=device)))
    return _mix(row[:, None] ^ torch.arange(d, device=device)) >> 16


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby 2008) on the sum of both halves of 64-bit integers."""
    x = (x ^ (x >> 32)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _codes(scaled: Tensor, form: RowFormat, chance: Tensor | None) -> Tensor:
    if form.name == "fp8":
        return _fp8(scaled, chance)
    if form.name == "sign":
        # 65536ths of the way from -1 to 1
        up = scaled >= 0 if chance is None else ((scaled * 32768).round().long() + 32768 + chance) >> 16 > 0
        return _pack(up.to(torch.uint8), 1)
    integer = scaled.round().long() if chance is None else ((scaled * 65536).round().long() + chance) >> 16
    if form.name == "int8":
        return integer.to(torch.int8)
    offset = 1 << (form.bits - 1)
    return _pack((integer + offset).to(torch.uint8), form.bits)


def _fp8(scaled: Tensor, chance: Tensor | None) -> Tensor:
    if chance is None:
        return scaled.to(torch.float8_e4m3fn)
    size = scaled.abs()
    # a float's lower 20 bits are what e4m3 has no place for; below 2^-6 its numbers are 2^-9 apart
    normal = (((size.view(torch.int32).long() + (chance << 4)) >> 20) << 20).to(torch.int32).view(torch.float32)
    small = (((size * 2.0**25).round().long() + chance) >> 16).float() * 2.0**-9
    return torch.copysign(torch.where(size < 2.0**-6, small, normal), scaled).to(torch.float8_e4m3fn)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of a few bits [N, d] to bytes, lower bits first; the last byte of a row is filled up with zeros."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(2, dtype=torch.uint8)
