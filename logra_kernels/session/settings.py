"""How a run projects and keeps its rows: as the user says, and where the user says nothing, as the store has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from logra_kernels.errors import StoreMismatch
from logra_kernels.nn import DEFAULT_KINDS, KINDS, Taps, capture, tappable
from logra_kernels.ops import RowFormat
from logra_kernels.projection import Projection
from logra_kernels.store import GradientStore, projection_of

_DTYPES = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """`Run`'s arguments of these names, none of them left open; `projection` None is the run's to choose."""

    include: Sequence[str] | None
    exclude: Sequence[str] | None
    kinds: Sequence[str]
    bias: bool
    projection: Projection | None
    projection_dtype: torch.dtype | None
    format: RowFormat
    rank_c: int | None

    @classmethod
    def of(
        cls,
        store: GradientStore | None,
        model: nn.Module,
        *,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        kinds: Sequence[str] | None,
        bias: bool | None,
        projection: Projection | None,
        projection_dtype: torch.dtype | None,
        dtype: str | None,
        block: int | None,
        rank_c: int | None,
    ) -> Self:
        """What the user says, filled up from the store, or where there is none, by the defaults.

        Raises:
            ValueError: An unknown dtype, or a block that does not fit it.
            StoreMismatch: The model has not all of the store's layers.
        """
        kept = RowFormat.of("fp32")
        if store is not None:
            kept = store.format
            stored = projection_of(store)
            if projection is None or projection == replace(stored, learned=None):
                projection = stored  # with what it learned for the store
            bias = store.meta.get("bias", False) if bias is None else bias
            projection_dtype = projection_dtype or _DTYPES[store.meta.get("projection_dtype")]
            layers = _layers_here(store, model)
            if include is None and exclude is None and kinds is None:
                include, kinds = layers, list(KINDS)
            rank_c = store.rank_c if rank_c is None else rank_c
        if block is not None or dtype not in (None, kept.name):
            kept = RowFormat.of(dtype or kept.name, block)
        kinds = kinds or DEFAULT_KINDS
        return cls(include, exclude, kinds, bool(bias), projection, projection_dtype, kept, rank_c)

    @property
    def meta(self) -> dict[str, object]:
        """What the store keeps of them beside its own fields."""
        named = {"projection_dtype": next(n for n, d in _DTYPES.items() if d == self.projection_dtype)}
        return {"bias": self.bias, **(named if self.projection_dtype is not None else {})}

    def capture(self, model: nn.Module, shared_inputs: bool | None) -> Taps:
        """The model's taps, still to be attached; errors as in `nn.capture`."""
        return capture(
            model,
            (self.projection or Projection()).drawn(),
            self.include,
            self.exclude,
            kinds=self.kinds,
            bias=self.bias,
            projection_dtype=self.projection_dtype,
            shared_inputs=shared_inputs,
        )

    def check(self, store: GradientStore, layers: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a store that was made with others.

        Args:
            store: The store.
            layers: Layer name -> (k_out, k_in), of the taps.

        Raises:
            StoreMismatch: Names every one that differs.
        """
        differs = []
        if store.layers != layers:
            differs.append(f"layers ({len(store.layers)} there, {len(layers)} here)")
        if self.projection is not None and store.projection != self.projection.to_dict():
            differs.append(f"projection ({store.projection} there, {self.projection.to_dict()} here)")
        if store.meta.get("bias", False) != self.bias:
            differs.append(f"bias ({not self.bias} there, {self.bias} here)")
        if store.rank_c != self.rank_c:
            differs.append(f"rank_c ({store.rank_c} there, {self.rank_c} here)")
        there, here = (facts.get("projection_dtype", "the model's") for facts in (store.meta, self.meta))
        if there != here:
            differs.append(f"projection_dtype ({there} there, {here} here)")
        if store.format != self.format:
            differs.append(f"dtype ({store.format} there, {self.format} here)")
        if differs:
            raise StoreMismatch(f"the store {store.path} was made with other settings: {'; '.join(differs)}")


def _layers_here(store: GradientStore, model: nn.Module) -> list[str]:
    """The store's layers, all of which the model has."""
    here = tappable(getattr(model, "_orig_mod", model))
    absent = [name for name in store.layers if name not in here]
    if absent:
        raise StoreMismatch(
            f"the store {store.path} was made with another model: {len(absent)} of its {len(store.layers)} layers"
            f" are not in this one ({', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}); give the model"
            " it was logged with, or log this one into another store"
        )
    return list(store.layers)
