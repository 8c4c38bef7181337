from logra_kernels.ops.factor_rows.op import factor_rows

__all__ = ["factor_rows"]
