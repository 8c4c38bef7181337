from logra_kernels.store.factors import projection_of, sidecars_of, spread_of
from logra_kernels.store.fsck import fsck
from logra_kernels.store.merge import merge
from logra_kernels.store.store import GradientStore

__all__ = ["GradientStore", "fsck", "merge", "projection_of", "sidecars_of", "spread_of"]
