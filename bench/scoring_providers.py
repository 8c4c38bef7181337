"""The same rows in everybody's own form, and everybody's way to score them: what bench_scoring.py times.

Peers are taken where they can be imported. LogIX gets its batches of 16 as views of a mapped file. For l-RelatIF
("cosine") it is given the identity as its KFAC curvature: what it does to every row for each query is then what it does
with any, and the answer is the one that is checked. Queries are solved for beforehand.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logra_kernels.store import GradientStore

TOP = 100
SIDE = 64  # of a layer's G
LOGIX_BATCH, LOGIX_ROWS = 16, 256  # rows LogIX is timed on at most: its time is proportional to them
FORMATS = ("fp32", "bf16", "fp16", "int8", "int4")
OWN = {form: (form, None) for form in FORMATS} | {"int8, int8 queries": ("int8", "int8")}  # provider -> rows, queries

Answer = tuple[Tensor, Tensor] | Tensor  # the best scores and their rows, or all scores


def layers_of(dim: int) -> dict[str, tuple[int, int]]:
    return {f"layer{i}": (SIDE, SIDE) for i in range(dim // SIDE**2)}


class Rows:
    """N rows on disk: as numbers alone, and as a store of ours in each format."""

    def __init__(self, folder: Path, count: int, dim: int):
        self.folder, self.count, self.dim = folder, count, dim
        self.plain = folder / "plain"
        self.plain.mkdir()
        self.norm = torch.empty(count)
        stores = {form: GradientStore.create(folder / form, layers_of(dim), form) for form in FORMATS}
        generator = torch.Generator().manual_seed(0)
        step = max(1, (64 << 20) // (4 * dim))
        with open(self.plain / "gradients.bin", "wb") as file:
            for start in range(0, count, step):
                rows = torch.randn(min(step, count - start), dim, generator=generator)
                self.norm[start : start + len(rows)] = rows.norm(dim=1)
                file.write(rows.numpy().data)
                for store in stores.values():
                    store.append(rows, [str(row) for row in range(start, start + len(rows))])
        for store in stores.values():
            store.close()

    def memmap(self) -> np.memmap:
        return np.memmap(self.plain / "gradients.bin", np.float32, "r", shape=(self.count, self.dim))


def ours(store: GradientStore, queries: Tensor, scale: Tensor | None, query_format: str | None) -> Callable[[], Answer]:
    queries = queries.bfloat16() if store.dtype == "bf16" else queries
    return lambda: store.topk(queries, TOP, row_scale=scale, query_format=query_format)


def numpy_matmul(rows: Rows, queries: Tensor, mode: str) -> Callable[[], Answer]:
    mapped, asked = rows.memmap(), queries.numpy()
    return lambda: torch.from_numpy(asked @ mapped.T)


def torch_matmul(rows: Rows, queries: Tensor, mode: str) -> Callable[[], Answer]:
    mapped = _tensor(rows.memmap())
    return lambda: queries @ mapped.T


def logix(rows: Rows, queries: Tensor, mode: str) -> Callable[[], Answer]:
    from logix.analysis import influence_function
    from logix.state import LogIXState

    influence_function.tqdm = lambda loader, **_: loader
    state = LogIXState()
    scorer = influence_function.InfluenceFunction(state)
    names = list(layers_of(rows.dim))
    asked = [str(query) for query in range(len(queries))], _by_layer(queries, names)
    mapped = _tensor(rows.memmap())[:LOGIX_ROWS]

    def batches() -> Iterator[tuple]:
        for start in range(0, len(mapped), LOGIX_BATCH):
            part = mapped[start : start + LOGIX_BATCH]
            yield [str(start + row) for row in range(len(part))], _by_layer(part, names)

    how = "cosine" if mode == "relatif" else "dot"
    if how == "cosine":
        state.covariance_state = {name: {"forward": torch.eye(SIDE), "backward": torch.eye(SIDE)} for name in names}
    options = {"mode": how, "precondition": False, "damping": 0.0}
    return lambda: scorer.compute_influence_all(asked, batches(), **options)["influence"]


def bergson(rows: Rows, queries: Tensor, mode: str) -> Callable[[], Answer]:
    from bergson import Attributor
    from bergson.gradients import GradientProcessor

    sizes = dict.fromkeys(layers_of(rows.dim), SIDE**2)
    info = {"num_grads": rows.count, "grad_sizes": sizes, "base_dtype": "float32"}
    (rows.plain / "info.json").write_text(json.dumps(info))
    GradientProcessor().save(rows.plain)
    index = Attributor(rows.plain)
    asked = {name: part.contiguous() for name, part in zip(sizes, queries.split(SIDE**2, dim=1), strict=True)}
    return lambda: index.search(asked, TOP)


PEERS: dict[str, Callable[[Rows, Tensor, str], Callable[[], Answer]]] = {
    "numpy": numpy_matmul,
    "torch": torch_matmul,
    "logix": logix,
    "bergson": bergson,
}
RELATIF = {"logix"}  # peers that have it; Bergson's unit norm scales the whole index once, when it is loaded


def _tensor(mapped: np.memmap) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nobody writes on it
        return torch.from_numpy(mapped)


def _by_layer(rows: Tensor, names: list[str]) -> dict[str, dict[str, Tensor]]:
    parts = rows.split(SIDE**2, dim=1)
    return {name: {"grad": part.unflatten(1, (SIDE, SIDE))} for name, part in zip(names, parts, strict=True)}
