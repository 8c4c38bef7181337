"""What a run will cost, before hours are spent on it: bytes on disk, peak memory, time."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.ops import FORMATS, RowFormat
from logra_kernels.run import Run
from logra_kernels.store import (
    GradientStore,
    check_rank,
    factored_bytes,
    held_bytes,
    layer_widths,
    process_bytes,
    shard_bytes,
    stored_width,
    writing_bytes,
)

PROBE_STEPS = 3  # after a first one that also pays for what is set up once
OBSERVED_STEPS = 2  # after a first one whose directions come from nothing
_OP_BYTES = 8 << 20  # what score_topk keeps beside the queries and the best rows


@dataclass(frozen=True)
class FormatCost:
    """What a store costs in one number format.

    Attributes:
        row_bytes: Of one stored row, its id and columns not counted.
        disk_bytes: Of all rows.
        topk_bytes: Peak resident memory of a process that asks for the top k, mapped pages of the store included.
    """

    row_bytes: int
    disk_bytes: int
    topk_bytes: int


@dataclass(frozen=True)
class Plan:
    """The costs of a store, by format.

    Attributes:
        rows, dim: N rows of D numbers.
        queries, k: What the top k is asked for.
        formats: Format name -> its costs; for a store that exists, its own format only.
        rank_c: Factors of each layer that a row is kept as; None where rows are kept as they are.
    """

    rows: int
    dim: int
    queries: int
    k: int
    formats: dict[str, FormatCost]
    rank_c: int | None = None


@dataclass(frozen=True)
class Observing:
    """What learning the projection costs before rows are logged.

    Attributes:
        first_seconds: Forward and backward of the first batch.
        step_seconds: Of a batch after it, the longer of two.
        solve_seconds: What the first logged batch takes longer than others, for the factors above all.
    """

    first_seconds: float
    step_seconds: float
    solve_seconds: float


@dataclass(frozen=True)
class Probe:
    """What logging costs, measured on a few batches.

    Attributes:
        samples: In each batch.
        step_seconds: Forward, backward and append of a batch, median.
        peak_bytes: Peak resident memory of a process that logs, the writer's full queue included, and observes first if
            the projection is to be learned.
        device_bytes: Peak memory of the CUDA device; None on the CPU.
        layers: name -> (k_out, k_in) of the layers that are logged.
        observing: None where the projection is not learned.
    """

    samples: int
    step_seconds: float
    peak_bytes: int
    device_bytes: int | None
    layers: dict[str, tuple[int, int]]
    observing: Observing | None = None

    def seconds(self, rows: int) -> float:
        """To log so many rows in batches of this size; the curvature is computed after that."""
        return -(-rows // self.samples) * self.step_seconds

    def observe_seconds(self, rows: int) -> float:
        """To learn the projection from so many rows in batches of this size."""
        if self.observing is None or not rows:
            return 0.0
        cost = self.observing
        return cost.first_seconds + (-(-rows // self.samples) - 1) * cost.step_seconds + cost.solve_seconds


def plan(
    source: GradientStore | str | os.PathLike | Mapping[str, tuple[int, int]],
    rows: int | None = None,
    *,
    queries: int = 64,
    k: int = 100,
    rank_c: int | None = None,
) -> Plan:
    """Disk and memory of a store that exists or is to be made. Nothing is read but a manifest.

    Args:
        source: A store or its path, or layers of one to be made: name -> (k_out, k_in).
        rows: How many; for a store, its own by default.
        queries, k: Of a `topk`.
        rank_c: Factors of each layer that rows to be made are kept as (`GradientStore.create`); a store has its own.

    Raises:
        ValueError: Layers without a number of rows, a count below 1, or `rank_c` for a store that has another.
        StoreError: No store there, or `rank_c` does not fit the layers.
    """
    if not isinstance(source, GradientStore | Mapping):
        source = GradientStore.open(source)
    if isinstance(source, Mapping):
        dim = sum(k_out * k_in for k_out, k_in in source.values())
        forms = {name: RowFormat.of(name) for name in FORMATS}
        check_rank(source, rank_c)
        each = layer_widths(list(source.values()), rank_c)
        widths = {name: stored_width(each, form) for name, form in forms.items()}
        row_bytes = {name: form.row_bytes(widths[name]) for name, form in forms.items()}
    else:
        if rank_c not in (None, source.rank_c):
            raise ValueError(f"plan: rank_c {rank_c} for a store that has {source.rank_c}; pass layers to plan another")
        dim, rows, rank_c = source.dim, len(source) if rows is None else rows, source.rank_c
        widths, row_bytes = {source.dtype: source.manifest.width}, {source.dtype: source.manifest.row_bytes}
    if rows is None:
        raise ValueError("plan: how many rows? pass rows= beside layers")
    if min(rows + 1, queries, k, dim) < 1:
        raise ValueError(f"plan: rows {rows}, queries {queries}, k {k} and dim {dim} must be positive")
    costs = {}
    for name, nbytes in row_bytes.items():
        largest = (
            shard_bytes(widths[name], forms[name])
            if isinstance(source, Mapping)
            else source.manifest.rows_per_shard * nbytes
        )
        width = widths[name]
        at_work = (
            4 * queries * width if rank_c is None else factored_bytes(rows, width, queries)
        )  # queries laid out anew
        asked = process_bytes("VmRSS") + held_bytes(rows * nbytes, largest) + _asking_bytes(queries, k, dim) + at_work
        costs[name] = FormatCost(nbytes, rows * nbytes, asked)
    return Plan(rows, dim, queries, k, costs, rank_c)


def _asking_bytes(queries: int, k: int, dim: int) -> int:
    """Of the queries and of the best rows so far."""
    return 4 * queries * dim + 2 * 16 * queries * 2 * k + _OP_BYTES


def probe(
    model: nn.Module,
    step: Callable[[], object],
    samples: int,
    *,
    sequence_length: int | None = None,
    weights: Tensor | None = None,
    **settings: Any,
) -> Probe:
    """Log a few batches for real, into a store that is thrown away, and measure.

    Where the projection is one to be learned ("pca"), a few batches are observed before that.

    Args:
        model: As `Run` takes it.
        step: Forward and backward of one batch.
        samples: How many samples that batch has.
        sequence_length: As in `Run.log`.
        weights: As in `Run.observe`.
        settings: Of `Run`: include, exclude, projection, dtype, rank_c, ...

    Raises:
        ValueError: As `Run` raises it, or samples below 1.
    """
    if samples < 1:
        raise ValueError(f"probe: samples is {samples}; it must be at least 1")
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset_peak()
    with tempfile.TemporaryDirectory() as scratch, Run(Path(scratch) / "store", model, **settings) as run:
        steps = 1 + OBSERVED_STEPS if run.learning else 0
        observed = [_seconds(step, run.observe(weights, sequence_length=sequence_length), device) for _ in range(steps)]
        peak = peak_bytes() if observed else 0
        reset_peak()
        ids = [[f"{number}-{sample}" for sample in range(samples)] for number in range(1 + PROBE_STEPS)]
        times = [_seconds(step, run.log(some, sequence_length=sequence_length), device) for some in ids]
        layers, manifest = dict(run.store.layers), run.store.manifest
    writing = writing_bytes(manifest.rows_per_shard * manifest.row_bytes)
    logged = min(len(times) * samples * manifest.row_bytes, writing)
    usual = statistics.median(times[1:])
    return Probe(
        samples,
        usual,
        max(peak, peak_bytes() - logged + writing),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        layers,
        Observing(observed[0], max(observed[1:]), max(times[0] - usual, 0.0)) if observed else None,
    )


def _seconds(step: Callable[[], object], inside: AbstractContextManager[None], device: torch.device) -> float:
    begun = time.perf_counter()
    with inside:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def peak_bytes() -> int:
    """The most that was resident in this process since `reset_peak`, or ever where that is not to be had."""
    return process_bytes("VmHWM")


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
