from logra_kernels.compat.from_bergson import import_bergson
from logra_kernels.compat.from_logix import import_logix

__all__ = ["import_bergson", "import_logix"]
