"""Rows in every format: how they keep the order of the scores, what they weigh, and how fast they are scored.

    python bench/bench_formats.py [--accuracy] [--rates] [--rows N] [--dim D]

Accuracy: the stories260K store's rows in each format against fp32, top-100 agreement over held-out queries by
influence and by l-RelatIF, of rows as they are and of rows whitened before they are quantised (needs LOGRA_DATA).
Rates: resident rows, each case checked against fp64 first; the cases take turns, no format after itself, so that rows
come from memory, and each keeps its best round. `read` is a plain read of the same bytes in the same rounds, `torch`
its own product of the same numbers. Prints a table and writes one file for each into bench/results.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from machine import commit, cpu_model  # noqa: E402
from plain_read import plain_reads  # noqa: E402
from record import RESULTS, slug, text  # noqa: E402

import logra_kernels as lk  # noqa: E402
from logra_kernels.curvature import CURVATURES, Factor  # noqa: E402
from logra_kernels.integrations.causal_lm import encode, loss_sum  # noqa: E402
from logra_kernels.ops import FORMATS  # noqa: E402

TOP, ROUNDS = 100, 5
QUERIES, LONGEST = 100, 256  # held-out stories, and the tokens kept of a story
DIM_SHOWN = 98304  # of the bytes a row takes
DEFAULT = "16 bits"  # what fp32 queries are beside integer codes unless told otherwise
QUERY_FORMATS = (DEFAULT, "fp32", "int8")


def accuracy() -> list[dict]:
    """Agreement of each format with fp32 on the rows and queries of the stories260K model."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, queries, factor = rows_and_queries(Path(scratch))
    solved, scale = factor.solve_toward_stored(queries), factor.quadratic(rows).rsqrt()
    exact = solved.double() @ rows.double().T
    white = factor.whiten(rows), factor.whiten(queries)
    made = []
    for form in formats():
        made.append(measured(form, rows, solved, exact, scale) | {"whitened": "no"})
        made.append(measured(form, *white, exact, scale) | {"whitened": "yes"})
    return made


def rows_and_queries(scratch: Path, k: int = 16) -> tuple[Tensor, Tensor, Factor]:
    """Gradients of the stories on every linear layer [2216, 9216 at k = 16]; those of 100 others; the curvature."""
    import stories260k

    folder = stories260k.data_dir()
    if folder is None:
        raise SystemExit("LOGRA_DATA is unset; it must name the folder of the stories260K model and the texts")
    model, tokenizer = stories260k.load(folder)
    texts = stories260k.stories(folder)
    held_out = random.Random(0).sample(range(len(texts)), QUERIES)
    logged = sorted(set(range(len(texts))) - set(held_out), key=lambda i: len(texts[i]))  # padding is work
    with lk.Run(scratch / "store", model, projection=lk.Projection(rank=k)) as run:
        for start in range(0, len(logged), 16):
            part = logged[start : start + 16]
            with run.log(ids=[str(i) for i in part]):
                loss_sum(model, encode(tokenizer, [texts[i] for i in part], max_length=LONGEST)).backward()
        factor = CURVATURES["shrunk"].of(run.commit()).factorize()
        asked = []
        for start in range(0, QUERIES, 20):
            part = held_out[start : start + 20]
            with run.query(ids=[f"q{i}" for i in part]) as query:
                loss_sum(model, encode(tokenizer, [texts[i] for i in part], max_length=LONGEST)).backward()
            asked.append(query.rows)
        return run.store.read(0, len(run.store)), torch.cat(asked), factor


def formats() -> list[lk.RowFormat]:
    whole = [lk.RowFormat.of(name) for name in FORMATS]
    return whole + [lk.RowFormat.of(name, 32) for name in ("int8", "int4")] + [lk.RowFormat.of("int8", 128, "fp16")]


def measured(form: lk.RowFormat, rows: Tensor, queries: Tensor, exact: Tensor, scale: Tensor) -> dict:
    """How far scores of encoded rows find the exact scores' best, and l-RelatIF's, which are scale * exact."""
    best = exact.topk(TOP).indices
    encoded = lk.quantize_rows(rows, form)
    kept = lk.dequantize_rows(encoded)
    scores = lk.score_block(queries, encoded)
    bits = 8 * form.row_bytes(DIM_SHOWN) / DIM_SHOWN
    found = {"format": str(form), f"bytes_per_row_D{DIM_SHOWN}": form.row_bytes(DIM_SHOWN), "bits": round(bits, 3)}
    found["relative_error"] = round(((kept - rows).norm() / rows.norm()).item(), 6)
    pairs = torch.stack((scores.double().flatten(), exact.flatten()))
    found["score_correlation"] = round(torch.corrcoef(pairs)[0, 1].item(), 6)
    found["top100"] = round(agreement(scores, best), 4)
    found["top100_relatif"] = round(agreement(scores * scale, (exact * scale).topk(TOP).indices), 4)
    if form.scaled:
        found["top100_int8_queries"] = round(agreement(lk.score_block(queries, encoded, query_format="int8"), best), 4)
    return found


def agreement(scores: Tensor, best: Tensor) -> float:
    """The share of each query's best rows that the scores find, on average."""
    found = scores.topk(best.shape[1]).indices
    return sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), best.tolist(), strict=True)) / best.numel()


def rates(count: int, dim: int, queries: int) -> list[dict]:
    """Each format at one shape, beside our fp32 and a plain read of the same bytes."""
    g, q = torch.randn(count, dim), torch.randn(queries, dim)
    encoded = {name: lk.quantize_rows(g, name) for name in FORMATS}
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for name, rows in encoded.items():
        given = q.bfloat16() if name == "bf16" else q
        for kind in QUERY_FORMATS if rows.format.scaled else (name,) if name == "bf16" else ("fp32",):
            option = kind if rows.format.scaled and kind != DEFAULT else None
            calls[name, kind] = lambda rows=rows, given=given, option=option: lk.score_block(
                given, rows, query_format=option
            )
    for (name, kind), call in calls.items():
        check(call(), q, encoded[name], kind)
    for name in ("fp32", "bf16"):
        given = q.to(encoded[name].codes.dtype)
        calls[name, "torch"] = lambda rows=encoded[name].codes, given=given: given @ rows.T
    del g
    reads = {(name, how): call for name, rows in encoded.items() for how, call in plain_reads([rows]).items()}
    best = dict.fromkeys((*calls, *reads), float("inf"))
    turns = sorted((calls | reads).items(), key=lambda turn: turn[0][1])  # by how the rows are read
    for _ in range(ROUNDS):
        for key, call in turns:
            started = time.perf_counter()
            call()
            best[key] = min(best[key], time.perf_counter() - started)
    made = []
    for key in calls:
        read = min(best[other] for other in reads if other[0] == key[0])
        made.append(row_of(key, best[key], best["fp32", "fp32"], read, encoded[key[0]], queries))
    return made


def row_of(key: tuple[str, str], took: float, fp32: float, read: float, rows: lk.EncodedRows, queries: int) -> dict:
    name, kind = key
    count, dim = rows.shape
    return {
        "shape": f"Q{queries} N{count} D{dim}", "format": name, "queries": kind, "best_ms": round(took * 1e3, 3),
        "gflops": round(2 * queries * count * dim / took / 1e9, 1), "pairs_per_s": round(queries * count / took),
        "gbytes_per_s": round(rows.nbytes / took / 1e9, 2), "read_gbytes_per_s": round(rows.nbytes / read / 1e9, 2),
        "of_read": round(read / took, 3), "times_fp32": round(fp32 / took, 3),
    }  # fmt: skip


def check(got: Tensor, queries: Tensor, rows: lk.EncodedRows, kind: str) -> None:
    """Within what the queries' own rounding allows of the fp64 product of the decoded rows."""
    sample = slice(0, len(rows), max(1, len(rows) // 64))
    exact = queries.double() @ lk.dequantize_rows(rows[sample]).double().T
    error = ((got[:, sample].double() - exact).norm() / exact.norm()).item()
    allowed = {"fp32": 1e-5, DEFAULT: 1e-4, "bf16": 5e-3, "int8": 2e-2}[kind]
    if not error < allowed:
        raise SystemExit(f"{rows.format} with {kind} queries: relative error {error:.1e}, allowed {allowed:.0e}")


def keep(op: str, rows: list[dict]) -> None:
    head = {"op": op, "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    contents = {**head, "threads": torch.get_num_threads(), "rows": rows}
    path = RESULTS / f"{op}-{slug(cpu_model())}.json"
    path.write_text(text(contents))
    print(f"-> {path.relative_to(HERE.parent)}")


def table(rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--rates", nargs="*", metavar="QxNxD", help="default 1, 4 and 64 queries on 2048x98304")
    arguments = parser.parse_args()
    if arguments.accuracy:
        rows = accuracy()
        table(rows)
        keep("formats_accuracy", rows)
    if arguments.rates is not None:
        found = []
        for shape in arguments.rates or ("1x2048x98304", "4x2048x98304", "64x2048x98304"):
            queries, count, dim = map(int, shape.split("x"))
            found += rates(count, dim, queries)
        table(found)
        keep("formats_rates", found)


if __name__ == "__main__":
    main()
