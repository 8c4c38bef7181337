"""dequantize_rows as the store calls it."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.dequantize_rows import reference


def dequantize_rows(rows: EncodedRows) -> Tensor:
    """The numbers [N, D] in fp32."""
    return reference.dequantize_rows(rows.codes, rows.scales, rows.dim, rows.format)
