"""Rows to store, and what a directory holds."""

from pathlib import Path

import torch
from torch import Tensor

from logra_kernels.store import GradientStore

LAYERS = {"first": (2, 3), "h.0.mlp": (4, 4)}
DIM = 22


def rows_of(count: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def ids_of(count: int) -> list[str]:
    return [f"row-{i}" for i in range(count)]


def columns_of(count: int) -> dict[str, list]:
    return {
        "source": [None if i % 5 == 3 else f"book {i % 4}" for i in range(count)],
        "span": [[i, i + 7] for i in range(count)],
        "weight": [i / 3 for i in range(count)],
    }


def part_of(count: int, start: int, stop: int) -> tuple[Tensor, list[str], dict[str, list]]:
    """Rows [start, stop) of `count` with their ids and columns, as `append` takes them."""
    columns = {name: values[start:stop] for name, values in columns_of(count).items()}
    return rows_of(count)[start:stop], ids_of(count)[start:stop], columns


def write(path: Path, count: int = 20, dtype: str = "fp32", rows_per_shard: int | None = 8) -> Path:
    """A store of `count` rows, written in one go."""
    with GradientStore.create(path, LAYERS, dtype, rows_per_shard=rows_per_shard) as store:
        store.append(*part_of(count, 0, count))
    return path


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path` and its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
