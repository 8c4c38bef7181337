"""Whether a session's model and settings are those that a store was logged with."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from logra_kernels.errors import StoreMismatch
from logra_kernels.nn import tappable
from logra_kernels.ops import RowFormat
from logra_kernels.projection import Projection
from logra_kernels.store import GradientStore


def agreed(projection: Projection | None, stored: Projection) -> Projection:
    """The store's, unless the user's differs in more than factors that were learned for the store."""
    if projection is None or projection == replace(stored, learned=None):
        return stored
    return projection


def layers_here(store: GradientStore, model: nn.Module) -> list[str]:
    """The store's layers, all of which the model has.

    Raises:
        StoreMismatch: It has not.
    """
    here = tappable(getattr(model, "_orig_mod", model))
    absent = [name for name in store.layers if name not in here]
    if absent:
        raise StoreMismatch(
            f"the store {store.path} was made with another model: {len(absent)} of its {len(store.layers)} layers"
            f" are not in this one ({', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}); give the model"
            " it was logged with, or log this one into another store"
        )
    return list(store.layers)


def check_settings(
    store: GradientStore,
    layers: Mapping[str, tuple[int, int]],
    projection: Projection | None,
    form: RowFormat,
    rank_c: int | None,
    meta: Mapping[str, object],
) -> None:
    """Refuse other settings than the store's.

    Args:
        store: The store.
        layers: Layer name -> (k_out, k_in).
        projection, form, rank_c: As `Run` was given them.
        meta: "bias" and "projection_dtype".

    Raises:
        StoreMismatch: Names every one that differs.
    """
    differs = []
    if store.layers != layers:
        differs.append(f"layers ({len(store.layers)} there, {len(layers)} here)")
    if projection is not None and store.projection != projection.to_dict():
        differs.append(f"projection ({store.projection} there, {projection.to_dict()} here)")
    if store.meta.get("bias", False) != meta["bias"]:
        differs.append(f"bias ({not meta['bias']} there, {meta['bias']} here)")
    if store.rank_c != rank_c:
        differs.append(f"rank_c ({store.rank_c} there, {rank_c} here)")
    there, here = (facts.get("projection_dtype", "the model's") for facts in (store.meta, meta))
    if there != here:
        differs.append(f"projection_dtype ({there} there, {here} here)")
    if store.format != form:
        differs.append(f"dtype ({store.format} there, {form} here)")
    if differs:
        raise StoreMismatch(f"the store {store.path} was made with other settings: {'; '.join(differs)}")
