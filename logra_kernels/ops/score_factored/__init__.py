from logra_kernels.ops.score_factored.op import score_factored

__all__ = ["score_factored"]
