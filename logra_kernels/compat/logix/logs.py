"""Logs as LogIX hands them out, (ids, {layer: {"grad": [N, k_out, k_in]}}), from rows and back, and their loaders."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from logra_kernels.compat.logix.utils import Log, merge_logs
from logra_kernels.store import GradientStore

GRAD = "grad"
Layers = Mapping[str, tuple[int, int]]


def nested(rows: Tensor, layers: Layers) -> dict[str, dict[str, Tensor]]:
    """{layer: {"grad": [N, k_out, k_in]}} of rows [N, D], as views."""
    parts = rows.split([k_out * k_in for k_out, k_in in layers.values()], dim=1)
    return {name: {GRAD: part.unflatten(1, shape)} for (name, shape), part in zip(layers.items(), parts, strict=True)}


def rows_of(log: Log, layers: Layers) -> tuple[list[str], Tensor]:
    """(ids, rows [N, D] fp32 on the CPU) of a log, nested or flat.

    Raises:
        ValueError: It is no log, or one of other layers.
    """
    try:
        ids, held = log
        ids = list(ids)
    except (TypeError, ValueError):
        raise ValueError(
            f"logix: a log is (ids, gradients), as get_log() gives it, not a {type(log).__name__}"
        ) from None
    if isinstance(held, Tensor):
        rows = held.detach().flatten(1).float().cpu()
    else:
        wrong = [name for name, shape in layers.items() if _shape(held, name) != (len(ids), *shape)]
        if wrong or len(held) != len(layers):
            what = f"no gradient [{len(ids)}, k_out, k_in] of layer {wrong[0]!r}" if wrong else "other layers as well"
            raise ValueError(f"logix: the log has {what}; logs must be of the layers that are watched, {list(layers)}")
        rows = torch.cat([held[name][GRAD].detach().flatten(1).float().cpu() for name in layers], dim=1)
    width = sum(k_out * k_in for k_out, k_in in layers.values())
    if rows.shape != (len(ids), width):
        raise ValueError(f"logix: the log's rows {tuple(rows.shape)} must be [{len(ids)}, {width}]")
    return ids, rows


def _shape(held: Any, name: str) -> tuple[int, ...] | None:
    found = held[name].get(GRAD) if isinstance(held, Mapping) and name in held else None
    return tuple(found.shape) if isinstance(found, Tensor) else None


class LogDataset(Dataset):
    """The stored rows: item i is (id, {layer: {"grad": [k_out, k_in]}}), or (id, row [D]) with `flatten`."""

    def __init__(self, path: str | os.PathLike, flatten: bool = False) -> None:
        self.path, self.flatten = os.fspath(path), flatten
        self._store: GradientStore | None = None
        self._ids: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}  # a worker opens its own

    @property
    def store(self) -> GradientStore:
        if self._store is None:
            self._store = GradientStore.open(self.path)
        return self._store

    @property
    def data_id_list(self) -> list[str]:
        if self._ids is None:
            self._ids = self.store.ids
        return self._ids

    def __len__(self) -> int:
        return len(self.data_id_list)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, Any]]:
        first, last = min(indices), max(indices)
        if last - first < 2 * len(indices):
            rows = self.store.read(first, last + 1)[[i - first for i in indices]]
        else:
            rows = torch.cat([self.store.read(i, i + 1) for i in indices])
        ids = self.data_id_list
        if self.flatten:
            return [(ids[i], row) for i, row in zip(indices, rows, strict=True)]
        log = nested(rows, self.store.layers)
        return [(ids[i], {name: {GRAD: part[GRAD][at]} for name, part in log.items()}) for at, i in enumerate(indices)]


def collated(items: Sequence[tuple[str, Any]]) -> Log:
    """Items of a `LogDataset` as one log."""
    return merge_logs([([name], _one(value)) for name, value in items])


def _one(value: Any) -> Any:
    return value[None] if isinstance(value, Tensor) else {key: _one(part) for key, part in value.items()}


def loader_of(
    path: str | os.PathLike, batch_size: int, num_workers: int, pin_memory: bool, flatten: bool
) -> DataLoader:
    """A DataLoader of the stored rows as logs, in their order."""
    return DataLoader(
        LogDataset(path, flatten),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        shuffle=False,
        collate_fn=collated,
    )


def stored_by(loader: Any) -> GradientStore | None:
    """The store whose rows, all and in order, a loader goes through; None of any other loader."""
    dataset = getattr(loader, "dataset", None)
    whole = isinstance(dataset, LogDataset) and isinstance(getattr(loader, "sampler", None), SequentialSampler)
    return dataset.store if whole and not getattr(loader, "drop_last", False) else None  # type: ignore[union-attr]
