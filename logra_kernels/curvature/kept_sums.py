"""Sums over rows beside a store: what was summed is recognised, and only rows that are new are added.

The sums of whole panels are kept with a hash of the rows that they hold. A store that begins with these very rows goes
on from there, one whose rows are all the same needs nothing, any other starts anew.
"""

import json
from collections.abc import Collection, Iterator

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.sums import Progress, RowSums
from logra_kernels.store import GradientStore, Share

_BYTES = 64 << 20
MOST_REMOVED = 0.1  # of the rows; beyond, the rounding of what was taken out again is not worth keeping
LEAST_LEFT = 0.5  # of a trace, for the same reason


def load(store: GradientStore, name: str, sums: RowSums) -> bool:
    """Have `sums` go on from what is kept, as far as it is; whether that is the sum over exactly this store's rows."""
    kept = store.sidecar_read(name, key=_setting(store, sums.dtype))
    if kept is None or any(one not in kept[0] for one in sums.shapes):
        return False
    tensors, facts = kept
    current = facts["content"] == store.content_hash
    if not current and (
        facts["rows"] > len(store) or facts["prefix"] != _prefix(store, facts["shards"], facts["rows"])
    ):
        return False
    sums.restore({one: tensors[one] for one in sums.shapes}, facts["rows"], facts["removed"])
    return current


def advance(store: GradientStore, sums: RowSums, progress: Progress | None) -> None:
    """Add the store's rows that the sums do not hold."""
    for rows in _rows_from(store, sums.rows):
        sums.add(rows)
        if progress is not None:
            progress(len(rows))


def save(store: GradientStore, name: str, sums: RowSums, names: Collection[str]) -> None:
    """Keep sums of all the store's rows, in place of earlier ones; those of these names."""
    tensors = {one: total for one, total in sums.sums.items() if one in names}
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
    store.sidecar_keep(name, tensors, facts, key=_setting(store, sums.dtype))


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
    if start == 0 and stop == len(store) and not isinstance(store, Share):  # whose blocks are one rank's
        yield from (rows for _, rows in store.blocks())
        return
    step = max(1, _BYTES // (4 * store.dim))
    for first in range(start, stop, step):
        yield store.read(first, min(first + step, stop)).to(store.manifest.torch_dtype)
