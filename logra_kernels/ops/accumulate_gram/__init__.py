from logra_kernels.ops.accumulate_gram.op import accumulate_gram

__all__ = ["accumulate_gram"]
