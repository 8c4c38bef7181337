from logra_kernels.ops.project_rows.op import ProjectRows, columns_stand_alone, project_rows, row_projector

__all__ = ["ProjectRows", "columns_stand_alone", "project_rows", "row_projector"]
