from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.fisher import RawFisher

__all__ = ["Factor", "RawFisher"]
