"""Gram sums beside a store: what was summed is recognised, and only rows that are new are added.

The sums of whole panels are kept with a hash of the rows that they hold. A store that begins with these very rows goes
on from there, one whose rows are all the same needs nothing, any other starts anew.
"""

import json
from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.gram import GramSums
from logra_kernels.curvature.statistics import Progress
from logra_kernels.store import GradientStore

_BYTES = 64 << 20
MOST_REMOVED = 0.1  # of the rows; beyond, the rounding of what was taken out again is not worth keeping


def load(store: GradientStore, name: str, parts: dict[str, slice], dtype: torch.dtype) -> tuple[GramSums, bool]:
    """(sums of these layers as far as they are kept, whether they are those of exactly this store's rows)."""
    kept = store.sidecar_read(name, key=_setting(store, dtype))
    if kept is None or any(layer not in kept[0] for layer in parts):
        return GramSums(parts, dtype), False
    tensors, facts = kept
    current = facts["content"] == store.content_hash
    if not current and (
        facts["rows"] > len(store) or facts["prefix"] != _prefix(store, facts["shards"], facts["rows"])
    ):
        return GramSums(parts, dtype), False
    return GramSums(parts, dtype, {layer: tensors[layer] for layer in parts}, facts["rows"], facts["removed"]), current


def advance(store: GradientStore, sums: GramSums, progress: Progress | None) -> None:
    """Add the store's rows that the sums do not hold."""
    for rows in _rows_from(store, sums.rows):
        sums.add(rows)
        if progress is not None:
            progress(len(rows))


def save(store: GradientStore, name: str, sums: GramSums) -> None:
    """Keep sums of all the store's rows, in place of earlier ones; of layers with at least as many rows as dims."""
    tensors = {layer: total for layer, total in sums.sums.items() if len(total) <= len(store)}
    if not tensors:
        return
    shards = _whole_shards(store, sums.whole)
    facts = {
        "content": store.content_hash,
        "rows": sums.whole,
        "removed": sums.removed,
        "shards": shards,
        "prefix": _prefix(store, shards, sums.whole),
    }
    store.sidecar_write(name, tensors, facts, key=_setting(store, sums.dtype))


def _setting(store: GradientStore, dtype: torch.dtype) -> str:
    facts = [list(store.layers.items()), store.manifest.kept_as, str(dtype)]
    return xxhash.xxh3_128(json.dumps(facts).encode()).hexdigest()


def _whole_shards(store: GradientStore, rows: int) -> int:
    """How many shards, from the first, are full and lie within the first `rows` rows."""
    manifest, end, count = store.manifest, 0, 0
    for shard in manifest.shards:
        end += shard.shown
        if end > rows or shard.stop - shard.start < manifest.rows_per_shard:
            break
        count += 1
    return count


def _prefix(store: GradientStore, shards: int, rows: int) -> str:
    """Hash of the first `rows` rows: that many shards by their checksums, the rest by their numbers."""
    digest, end = xxhash.xxh3_128(), 0
    for shard in store.manifest.shards[:shards]:
        digest.update(f"{shard.rows.checksum} {shard.deleted.checksum if shard.deleted else ''}\n".encode())
        end += shard.shown
    for block in _rows_from(store, end, rows):
        digest.update(block.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rows_from(store: GradientStore, start: int, stop: int | None = None) -> Iterator[Tensor]:
    """Rows [start, stop) in blocks, in the dtype that `store.blocks` gives them in."""
    stop = len(store) if stop is None else stop
    if start == 0 and stop == len(store):
        yield from (rows for _, rows in store.blocks())
        return
    step = max(1, _BYTES // (4 * store.dim))
    for first in range(start, stop, step):
        yield store.read(first, min(first + step, stop)).to(store.manifest.torch_dtype)
