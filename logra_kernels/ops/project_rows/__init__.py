from logra_kernels.ops.project_rows.op import ProjectRows, project_rows, row_projector

__all__ = ["ProjectRows", "project_rows", "row_projector"]
