"""Sums over batches that a run observed, kept beside the store whose model, layers and projection they share.

They are no sums over stored rows: rows that are appended or deleted leave them as they are.
"""

import json
from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from logra_kernels.store import GradientStore


def setting_of(store: GradientStore) -> str:
    """Hash of model, loss, layers and projection, whatever rows there are."""
    facts = [store.fingerprints, store.projection, list(store.layers.items()), store.meta]
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def keep_observed(store: GradientStore, name: str, sums: Mapping[str, Tensor]) -> None:
    """Keep sums, the counts of what was summed among them, in place of earlier ones of that name."""
    held = {entry: tensor.detach().cpu().contiguous() for entry, tensor in sums.items()}
    digest = xxhash.xxh3_128()
    for entry, tensor in sorted(held.items()):
        digest.update(entry.encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes())
    store.sidecar_write(name, held, {"hash": digest.hexdigest()}, key=setting_of(store))


def observed(store: GradientStore, name: str) -> tuple[dict[str, Tensor], str] | None:
    """(the sums, their hash), or None where nothing was observed in this setting."""
    kept = store.sidecar_read(name, key=setting_of(store))
    return None if kept is None else (kept[0], kept[1]["hash"])
