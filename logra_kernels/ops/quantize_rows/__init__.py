from logra_kernels.ops.quantize_rows.op import quantize_rows

__all__ = ["quantize_rows"]
