"""Sums over batches that a run observed, kept beside the rows whose model, layers and projection they share.

They are no sums over stored rows: rows that are appended or deleted leave them as they are. Where several stores become
one, they add up.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from logra_kernels.store.facts import Facts
from logra_kernels.store.format import SIDECARS
from logra_kernels.store.sidecar import write_sidecar


def setting_of(store: Facts) -> str:
    """Hash of model, loss, layers and projection, whatever rows there are."""
    facts = [store.fingerprints, store.projection, list(store.layers.items()), store.meta]
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def keep_observed(store: Facts, name: str, sums: Mapping[str, Tensor]) -> None:
    """Keep sums, the counts of what was summed among them, in place of earlier ones of that name."""
    held = {entry: tensor.detach().cpu().contiguous() for entry, tensor in sums.items()}
    store.sidecar_write(name, held, {"hash": _hash(held)}, key=setting_of(store))


def observed(store: Facts, name: str) -> tuple[dict[str, Tensor], str] | None:
    """(the sums, their hash), or None where nothing was observed in this setting."""
    kept = store.sidecar_read(name, key=setting_of(store))
    return None if kept is None else (kept[0], kept[1]["hash"])


def take_observed(stores: Sequence[Facts], directory: Path) -> None:
    """Keep in a store that is made of others, of one setting, the sum of what was observed beside each."""
    key = setting_of(stores[0])
    names = {path.name.split(".")[0] for store in stores for path in (store.path / SIDECARS).glob(f"*.{key}.*")}
    for name in sorted(names):
        sums: dict[str, Tensor] = {}
        for found in (observed(store, name) for store in stores):
            for entry, tensor in () if found is None else found[0].items():
                sums[entry] = sums[entry] + tensor if entry in sums else tensor
        write_sidecar(directory, name, key, sums, {"hash": _hash(sums)})


def _hash(sums: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for entry, tensor in sorted(sums.items()):
        digest.update(entry.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
