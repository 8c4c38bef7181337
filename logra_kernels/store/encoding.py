"""Rows on their way into a shard's tensors and out of them."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from logra_kernels.ops import EncodedRows, dequantize_rows, factor_rows, quantize_rows, rebuild_rows
from logra_kernels.ops._factored import parts
from logra_kernels.store.format import Manifest


def encode_here(manifest: Manifest, rows: Tensor) -> dict[str, Tensor]:
    """Rows [n, D] on their own device as tensors of their own, named as in `Manifest.tensors`."""
    if manifest.rank is not None:
        rows = factors_of(manifest, rows)
    rows = spread_out(manifest, rows)
    if not manifest.format.scaled:
        return {"rows": rows.to(manifest.format.value_dtype, copy=True, memory_format=torch.contiguous_format)}
    encoded = quantize_rows(rows, manifest.format)
    assert encoded.scales is not None
    return {"rows": encoded.codes, "scales": encoded.scales}


def factors_of(manifest: Manifest, rows: Tensor) -> Tensor:
    """[n, F] fp32, layers side by side. Where layers lie apart, u and v share blocks: |u| = |v|, but the fewer numbers
    of one would be larger, and the others lost beside them."""
    assert manifest.rank is not None
    found = factor_rows(rows, manifest.sizes, manifest.rank).float()
    if manifest.apart:
        for (k_out, k_in), (_, left, right) in zip(manifest.sizes, parts(manifest.sizes, manifest.rank), strict=True):
            if k_out != k_in:
                found[:, left] *= (k_out / k_in) ** 0.25
                found[:, right] *= (k_in / k_out) ** 0.25
    return found


def row_sums(rows: EncodedRows) -> Tensor:
    """xxh3_64 of each row's codes and scales as they are stored, [n] int64."""
    parts = [t.contiguous().view(torch.uint8).numpy() for t in (rows.codes, rows.scales) if t is not None]
    found = torch.empty(len(rows), dtype=torch.int64, device="cpu")
    for row in range(len(rows)):
        state = xxhash.xxh3_64()
        for part in parts:
            state.update(part[row].data)
        found[row] = state.intdigest() - (1 << 63)
    return found


def wrap(manifest: Manifest, tensors: Mapping[str, Tensor]) -> EncodedRows:
    """A shard's tensors as rows that can be scored."""
    return EncodedRows(manifest.format, manifest.width, tensors["rows"], tensors.get("scales"))


def laid_out(manifest: Manifest, rows: Tensor) -> Tensor:
    """Rows or queries [n, D], or factors side by side, as they lie in the store, [n, `Manifest.width`], where layers
    lie apart; else they."""
    if not manifest.apart:
        return rows
    found = rows.new_zeros(len(rows), manifest.width)
    for part, place in manifest.spans:
        found[:, place] = rows[:, part]
    return found


def spread_out(manifest: Manifest, rows: Tensor) -> Tensor:
    """`laid_out` for rows that are about to be encoded, which must not feel what fills a layer's last block up."""
    found = laid_out(manifest, rows)
    block = manifest.format.block
    if manifest.apart and block is not None and manifest.format.name == "sign":  # a scale is the mean of |g|
        for _, place in manifest.spans[:-1]:
            own = slice(place.stop // block * block, place.stop)
            found[:, place.stop : own.start + block] = found[:, own].abs().mean(1, keepdim=True)
    return found


def decode(manifest: Manifest, rows: EncodedRows) -> Tensor:
    """[n, D] in `Manifest.torch_dtype`; the codes themselves where these are the rows' numbers."""
    numbers = stored_numbers(rows)
    if manifest.rank is not None:
        return rebuild_rows(numbers, manifest.sizes, manifest.rank, align=manifest.align)
    if manifest.apart:
        return torch.cat([numbers[:, place] for _, place in manifest.spans], dim=1)
    return numbers


def stored_numbers(rows: EncodedRows) -> Tensor:
    """[n, `Manifest.width`]: the rows' numbers, with what lies between layers, or those of their factors."""
    return dequantize_rows(rows) if rows.format.scaled else rows.codes
