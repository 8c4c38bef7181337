from logra_kernels.store.factors import projection_of, sidecars_of, spread_of
from logra_kernels.store.format import layer_widths, shard_bytes, stored_width
from logra_kernels.store.life.fsck import fsck
from logra_kernels.store.life.merge import merge
from logra_kernels.store.life.quantize import quantization_loss, quantize
from logra_kernels.store.observed import keep_observed, observed
from logra_kernels.store.reading.ahead import held_bytes
from logra_kernels.store.reading.coarse import IndexInfo
from logra_kernels.store.reading.memory import process_bytes
from logra_kernels.store.reading.reader import factored_bytes
from logra_kernels.store.reading.scoring import RowScorer
from logra_kernels.store.reading.share import Share, gather_from_ranks, sum_over_ranks
from logra_kernels.store.reading.zero import known_zero_layers, zero_layers
from logra_kernels.store.skipped import add_skipped, read_skipped
from logra_kernels.store.store import GradientStore
from logra_kernels.store.whitening import Whitening
from logra_kernels.store.writing.create import check_rank
from logra_kernels.store.writing.writer import writing_bytes

__all__ = [
    "GradientStore",
    "IndexInfo",
    "RowScorer",
    "Share",
    "Whitening",
    "add_skipped",
    "check_rank",
    "factored_bytes",
    "fsck",
    "gather_from_ranks",
    "held_bytes",
    "keep_observed",
    "known_zero_layers",
    "layer_widths",
    "merge",
    "observed",
    "process_bytes",
    "projection_of",
    "quantization_loss",
    "quantize",
    "read_skipped",
    "shard_bytes",
    "sidecars_of",
    "spread_of",
    "stored_width",
    "sum_over_ranks",
    "writing_bytes",
    "zero_layers",
]
