"""quantize_rows as the store calls it."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows, RowFormat
from logra_kernels.ops.quantize_rows import reference


def quantize_rows(g: Tensor, form: RowFormat) -> EncodedRows:
    """Rows [N, D] in a format, rounded to the nearest code."""
    codes, scales = reference.quantize_rows(g, form)
    return EncodedRows(form, g.shape[1], codes, scales if form.scaled else None)
