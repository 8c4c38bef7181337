"""Queries in int8, as they meet rows with scales."""

from torch import Tensor

from logra_kernels.ops._format import EncodedRows, RowFormat
from logra_kernels.ops._native import row_major
from logra_kernels.ops.dequantize_rows import dequantize_rows
from logra_kernels.ops.quantize_rows import quantize_rows

MOST_SPAN = 512  # query numbers that share a scale, and no more than share one in the rows


def int8_queries(queries: Tensor, form: RowFormat) -> EncodedRows:
    """The queries' codes beside rows of a format."""
    return quantize_rows(queries, RowFormat.of("int8", min(form.block or MOST_SPAN, MOST_SPAN)))


def as_multiplied(queries: Tensor, form: RowFormat, digits: int) -> Tensor:
    """The numbers that enter the product with rows of a format: with 1 digit those that int8 queries stand for."""
    return dequantize_rows(int8_queries(queries, form)) if digits == 1 else queries


def operand(queries: Tensor, form: RowFormat, digits: int) -> Tensor | EncodedRows:
    """The same where bytes are multiplied: with 1 digit, beside whole codes, their codes, a row's being neighbours."""
    if digits == 1 and form.name != "fp8":
        return row_major(int8_queries(queries, form))
    return as_multiplied(queries, form, digits)
