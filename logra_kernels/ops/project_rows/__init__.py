from logra_kernels.ops.project_rows.op import project_rows

__all__ = ["project_rows"]
