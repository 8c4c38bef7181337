"""Scoring rows that lie on the device, and rows that stream to it from a store, in every format."""

import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from gpu_clock import failed, seconds_of
from tolerance import assert_as_good_as_naive
from torch import Tensor

import logra_kernels as lk
from logra_kernels.ops import EncodedRows, _dispatch
from logra_kernels.ops._queries import as_multiplied
from logra_kernels.store import GradientStore

FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
QUERIES = (1, 8, 64, 256)
PAPER = (256, 256, 917_504)  # queries, rows, D: 79,004 pairs a second on an A100 (LoGra, Llama-3-8B)
PAPER_PAIRS = 79_004
TOP = 100
CHECKED = 64  # rows compared with fp64


def backends(device: str) -> list[str]:
    if device == "cpu":
        return ["auto"]
    return ["triton", *(["cuda"] if _dispatch.cuda_error() is None else [])]


def rows_in(form: str, rows: Tensor) -> Tensor | EncodedRows:
    made = lk.RowFormat.of(form)
    return lk.quantize_rows(rows, made) if made.scaled else rows.to(made.code_dtype)


def in_fp64(rows: Tensor | EncodedRows) -> Tensor:
    return (rows if isinstance(rows, Tensor) else lk.dequantize_rows(rows)).double()


def scored(
    queries: Tensor, rows: Tensor | EncodedRows, backend: str, query_format: str | None = None
) -> Callable[[], Tensor]:
    """A call, whose first rows are right."""
    some = rows[:CHECKED]
    numbers = some if isinstance(some, Tensor) else lk.dequantize_rows(some)
    asked = as_multiplied(queries, rows.format, 1) if query_format and isinstance(rows, EncodedRows) else queries
    naive = (asked @ numbers.to(asked.dtype).T).float()
    exact = asked.double() @ numbers.double().T

    def call() -> Tensor:
        return lk.score_block(queries, rows, query_format=query_format, backend=backend)

    assert_as_good_as_naive(call()[:, :CHECKED], exact, naive)
    return call


def resident(device: str, count: int, dim: int, queries: tuple, part: str = "resident") -> Iterator[dict]:
    """bf16 queries; each format's rate beside torch's bf16 product of the same size."""
    plain = torch.randn(count, dim, device=device)
    asked = torch.randn(max(queries), dim, device=device).bfloat16()
    half = plain.bfloat16()
    for number in queries:
        of = {"part": part, "shape": f"Q{number} N{count} D{dim}"}
        calls: dict[str, Callable[[], Tensor]] = {"torch bf16": lambda number=number: asked[:number] @ half.T}
        for form in FORMATS:
            rows = rows_in(form, plain)
            query = asked[:number].to(torch.bfloat16 if form in ("bf16", "fp8", "int8", "int4") else torch.float32)
            for backend, digits in product(backends(device), (None, "int8") if form in ("int8", "int4") else (None,)):
                name = f"{form} {backend}" + ", int8 queries" * (digits is not None)
                try:
                    calls[name] = scored(query.float() if digits else query, rows, backend, digits)
                except Exception as error:  # whatever a kernel raises is its result here
                    yield failed(of, name, error)
        took = seconds_of(calls)
        for name, seconds in took.items():
            row = of | {"provider": name}
            row |= {"median_us": round(seconds * 1e6, 1), "pairs_per_s": round(number * count / seconds)}
            yield row | {"over_torch_bf16": round(took["torch bf16"] / seconds, 3)}


def topk(device: str, count: int, dim: int, number: int = 64) -> Iterator[dict]:
    """The best rows without a queries x rows matrix, beside torch's bf16 product and its topk."""
    plain = torch.randn(count, dim, device=device)
    asked = torch.randn(number, dim, device=device)
    half, half_asked = plain.bfloat16(), asked.bfloat16()
    of = {"part": "topk", "shape": f"Q{number} N{count} D{dim} k{TOP}"}
    calls: dict[str, Callable] = {"torch bf16, topk": lambda: (half_asked @ half.T).topk(TOP)}
    for form in ("bf16", "int8", "int4"):
        rows, query = rows_in(form, plain), half_asked if form == "bf16" else asked
        exact = query.double() @ in_fp64(rows).T
        for backend in backends(device):

            def call(query: Tensor = query, rows=rows, backend: str = backend) -> tuple[Tensor, Tensor]:
                return lk.score_topk(query, rows, TOP, backend=backend)

            try:
                check_order(*call(), exact)
            except Exception as error:
                yield failed(of, f"{form} {backend}", error)
            else:
                calls[f"{form} {backend}"] = call
    took = seconds_of(calls)
    for name, seconds in took.items():
        row = of | {"provider": name}
        row |= {"median_us": round(seconds * 1e6, 1), "pairs_per_s": round(number * count / seconds)}
        yield row | {"over_torch": round(took["torch bf16, topk"] / seconds, 3)}


def paper(device: str, shape: tuple[int, int, int] = PAPER) -> Iterator[dict]:
    queries, count, dim = shape
    for row in resident(device, count, dim, (queries,), "paper"):
        yield row if "error" in row else row | {"over_published": round(row["pairs_per_s"] / PAPER_PAIRS, 1)}


def wire_bandwidth(device: str, nbytes: int) -> float:
    """Bytes a second from pinned memory to the device."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / seconds_of({"copy": lambda: there.copy_(host, non_blocking=True)})["copy"]


def streamed(device: str, count: int, dim: int, queries: int = 64) -> Iterator[dict]:
    """Best rows of stores in the page cache, queries on the device."""
    wire = wire_bandwidth(device, min(1 << 28, count * dim * 2))
    asked = torch.randn(queries, dim, device=device)
    generator = torch.Generator(device).manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        calls, sizes = {}, {}
        for form in ("bf16", "int8", "int4"):
            with GradientStore.create(Path(folder) / form, {"layer": (1, dim)}, form) as made:
                for start in range(0, count, 512):
                    rows = torch.randn(min(512, count - start), dim, device=device, generator=generator)
                    made.append(rows, [str(start + i) for i in range(len(rows))])
            store = GradientStore.open(Path(folder) / form)
            sizes[form] = count * store.manifest.row_bytes
            query = asked.bfloat16() if form == "bf16" else asked
            check_best(store, query)
            calls[form] = lambda store=store, query=query: store.topk(query, TOP)
        took = seconds_of(calls, rounds=3)
        for form, seconds in took.items():
            row = {"part": "streamed", "shape": f"Q{queries} N{count} D{dim}", "provider": form}
            row |= {"median_ms": round(seconds * 1e3, 2), "pairs_per_s": round(queries * count / seconds)}
            row |= {
                "share_of_wire": float(f"{sizes[form] / seconds / wire:.3g}"),
                "over_bf16": float(f"{took['bf16'] / seconds:.3g}"),
            }
            yield row


def check_best(store: GradientStore, queries: Tensor) -> None:
    """The best rows' scores are those of fp64."""
    few = queries[:4]
    exact = torch.cat([few.double() @ rows.to(few.device).double().T for _, rows in store.blocks()], dim=1)
    check_order(*store.topk(few, TOP), exact)


def check_order(values: Tensor, index: Tensor, exact: Tensor) -> None:
    best = exact.topk(index.shape[1])
    slack = 2e-3 * exact.std()
    assert (values.double() - best.values).abs().max() < slack
    assert (exact.gather(1, index) - best.values).abs().max() < slack
