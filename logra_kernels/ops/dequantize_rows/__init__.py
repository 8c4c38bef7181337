from logra_kernels.ops.dequantize_rows.op import dequantize_rows

__all__ = ["dequantize_rows"]
