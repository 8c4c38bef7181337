from logra_kernels.ops.dequantize_rows.api import dequantize_rows

__all__ = ["dequantize_rows"]
