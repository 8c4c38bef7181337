from logra_kernels.store.factors import projection_of, sidecars_of, spread_of
from logra_kernels.store.fsck import fsck
from logra_kernels.store.merge import merge
from logra_kernels.store.skipped import add_skipped, read_skipped
from logra_kernels.store.store import GradientStore

__all__ = ["GradientStore", "add_skipped", "fsck", "merge", "projection_of", "read_skipped", "sidecars_of", "spread_of"]
