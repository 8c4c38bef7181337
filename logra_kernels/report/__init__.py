"""One self-contained HTML file that shows where a model's words come from."""

from logra_kernels.report.model import Answer, Arm, Proof, Provider, Report, Row
from logra_kernels.report.render import render

__all__ = ["Answer", "Arm", "Proof", "Provider", "Report", "Row", "render"]
