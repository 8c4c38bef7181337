"""A projection's learned factors, kept in the store whose rows were made with them.

    sidecars/projection.<digest>.safetensors           "<layer>/in" and "<layer>/out", P [k, d] fp32, bf16 or fp16
    sidecars/projection-spread.<digest>.safetensors    "<layer>", see `projection.learned`; by itself, since it is small

They are there before the first row is. The manifest names their digest, so other factors are refused.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.projection import Learned, Projection
from logra_kernels.store.format import PROJECTION_SIDECARS
from logra_kernels.store.store import GradientStore

_FACTORS, _SPREAD = PROJECTION_SIDECARS


def sidecars_of(projection: Projection) -> dict[str, tuple[str, Mapping[str, Tensor]]]:
    """What `GradientStore.create(sidecars=)` must keep of a projection; nothing where its settings are enough."""
    learned = projection.learned
    if learned is None:
        return {}
    spread = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in learned.spread.items()}
    return {_FACTORS: (learned.digest, learned.state()), _SPREAD: (learned.digest, spread)}


def projection_of(store: GradientStore) -> Projection:
    """The projection of the store's rows.

    Raises:
        StoreError: Its learned factors are missing, or are damaged.
        ValueError: They are not those that the manifest names, or the settings are of another generator.
    """
    spec = store.projection or {}
    learned = None
    if "factors" in spec:
        learned = Learned.restore(_read(store, _FACTORS, spec["factors"]), spread_of(store))
    return Projection.from_dict(spec, learned)


def spread_of(store: GradientStore) -> dict[str, float]:
    """Layer name -> mean eigenvalue of the whole layer's curvature over that of what its learned projection keeps.

    Empty for random factors, whose block has the whole layer's mean eigenvalue in expectation: E[P^T P] ~ I.

    Raises:
        StoreError: It is missing or damaged.
    """
    spec = store.projection or {}
    if "factors" not in spec:
        return {}
    return {name: float(value) for name, value in _read(store, _SPREAD, spec["factors"]).items()}


def _read(store: GradientStore, name: str, digest: str) -> dict[str, Tensor]:
    try:
        kept = store.sidecar_read(name, key=digest)
    except StoreError as error:
        raise StoreError(f"{store.path}: {error} (but not these: restore them from a copy, or log again)") from None
    if kept is None:
        raise StoreError(
            f"{store.path} lacks the factors that its rows were projected with (sidecars/{name}.{digest}.safetensors);"
            " restore them from a copy of the store, or log it again"
        )
    return kept[0]
