"""Rows on their way into a shard's tensors and out of them."""

from collections.abc import Mapping

from torch import Tensor

from logra_kernels.ops import EncodedRows, dequantize_rows, quantize_rows
from logra_kernels.store.format import Manifest


def encode(manifest: Manifest, rows: Tensor) -> dict[str, Tensor]:
    """Rows [n, D] of any device as CPU tensors of their own, named as in `Manifest.tensors`."""
    if not manifest.format.scaled:
        held = rows.new_empty(rows.shape, dtype=manifest.torch_dtype, device="cpu")
        return {"rows": held.copy_(rows)}
    encoded = quantize_rows(rows, manifest.format).to("cpu")
    assert encoded.scales is not None
    return {"rows": encoded.codes, "scales": encoded.scales}


def wrap(manifest: Manifest, tensors: Mapping[str, Tensor]) -> EncodedRows:
    """A shard's tensors as rows that can be scored."""
    return EncodedRows(manifest.format, manifest.dim, tensors["rows"], tensors.get("scales"))


def decode(rows: EncodedRows) -> Tensor:
    """[n, D] in `Manifest.torch_dtype`; the codes themselves where these are numbers."""
    return dequantize_rows(rows) if rows.format.scaled else rows.codes
