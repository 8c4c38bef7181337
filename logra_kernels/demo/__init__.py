"""`logra demo`: the main job, end to end, on text that every machine has."""

from logra_kernels.demo.arguments import add_arguments, run

__all__ = ["add_arguments", "run"]
