from logra_kernels.store.store import GradientStore

__all__ = ["GradientStore"]
