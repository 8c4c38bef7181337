from logra_kernels.ops.quantize_rows.api import quantize_rows

__all__ = ["quantize_rows"]
