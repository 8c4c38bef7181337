"""Which layers have no gradient in any stored row, as an expert that no token came to.

sidecars/nonzero.<content hash>.safetensors      "nonzero", in how many blocks of rows each layer has a number, [layers]
"""

import torch
from torch import Tensor

from logra_kernels.store.reading.share import sum_over_ranks
from logra_kernels.store.store import GradientStore

_SIDECAR = "nonzero"


def zero_layers(store: GradientStore) -> frozenset[str]:
    """Layers whose numbers are exactly zero in every row, of which there is at least one; from a pass, once."""
    found = known_zero_layers(store)
    if found is not None:
        return found
    nonzero = torch.zeros(len(store.layers), dtype=torch.int64, device="cpu")
    for _, rows in store.blocks():
        nonzero += torch.stack([rows[:, part].any() for part in store.slices.values()])
    sum_over_ranks(store, [nonzero])
    store.sidecar_keep(_SIDECAR, {"nonzero": nonzero})
    return _named(store, nonzero)


def known_zero_layers(store: GradientStore) -> frozenset[str] | None:
    """`zero_layers`, where it was asked before; None where not."""
    kept = store.sidecar_read(_SIDECAR)
    return None if kept is None else _named(store, kept[0]["nonzero"])


def _named(store: GradientStore, nonzero: Tensor) -> frozenset[str]:
    return frozenset(name for name, blocks in zip(store.layers, nonzero.tolist(), strict=True) if not blocks)
