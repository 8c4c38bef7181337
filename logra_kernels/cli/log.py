"""`logra log`: one projected gradient for each row of a data set, into a store that a rerun continues."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from logra_kernels.cli import checks, session
from logra_kernels.errors import LograError, StoreError
from logra_kernels.ops import FORMATS

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from logra_kernels.integrations.causal_lm import Batch
    from logra_kernels.integrations.text_data import TextRow
    from logra_kernels.run import Run

_COMPARED = 1 << 14  # stored rows that are compared with the data at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="local directory of a Hugging Face causal language model")
    parser.add_argument("data", metavar="DATA", nargs="+", help=".jsonl, .parquet or .txt files, also with .gz")
    parser.add_argument("--out", required=True, metavar="STORE", help="directory of the store; an existing one goes on")
    gradients = parser.add_argument_group("gradients")
    gradients.add_argument("--rank", type=int, default=64, help="k_in and k_out of every layer (default 64)")
    gradients.add_argument(
        "--projection",
        metavar="KIND",
        help="pca (default), learned from a sample of the rows first, or at random: orthonormal (default with"
        " --observe 0), gaussian, rademacher, kaiming, mask, sjlt; or two with a comma between, of a layer's input and"
        " output",
    )
    gradients.add_argument(
        "--observe", type=int, default=256, metavar="N", help="rows of the sample (default 256); 0 looks at none"
    )
    gradients.add_argument("--seed", type=int, default=0, help="of the projection and the sample (default 0)")
    session.add_curvature_argument(gradients)
    gradients.add_argument("--include", nargs="+", action="extend", metavar="GLOB", help='layers, such as "*.mlp.*"')
    gradients.add_argument("--exclude", nargs="+", action="extend", metavar="GLOB", help="layers to leave out")
    data = parser.add_argument_group("data")
    data.add_argument("--text-field", default="text")
    data.add_argument("--id-field", default="id")
    data.add_argument("--source-field", default="source", help="the provider of a row")
    data.add_argument("--limit", type=int, help="log the first so many rows only")
    data.add_argument("--max-length", type=int, help="tokens kept of a row (default 512, or the model's positions)")
    data.add_argument("--no-text", action="store_true", help="keep the texts out of the store")
    data.add_argument(
        "--nonfinite",
        choices=["raise", "skip"],
        default="raise",
        help="rows whose loss or gradient is NaN or infinite: end with an error, or go on without them (default raise)",
    )
    cost = parser.add_argument_group("cost")
    cost.add_argument("--dtype", choices=FORMATS, default="fp32", help="of the stored rows (default fp32)")
    cost.add_argument(
        "--rank-c", type=int, help="keep so many factors of each layer, 1 to 8, in place of k_out x k_in numbers"
    )
    cost.add_argument("--batch-size", type=int, default=8, help="rows in one forward and backward (default 8)")
    session.add_window_argument(cost)
    cost.add_argument("--rows-per-shard", type=int, help="rows in one file of the store (default about 64 MB worth)")
    session.add_device_argument(cost)


def run(args: argparse.Namespace) -> int:
    """Log, finalize, print a summary; 130 after Ctrl-C."""
    checks.check_least(args, batch_size=1, window=1, limit=1, observe=0, rows_per_shard=1, max_length=2)
    checks.check_rank_c(args.rank_c)
    args.projection = args.projection or ("pca" if args.observe else "orthonormal")
    asking = [what for what in (args.projection, args.curvature) if {*what.split(",")} & {"pca", "kfac", "ekfac"}]
    if asking and not args.observe:
        raise ValueError(f"--observe 0 leaves {' and '.join(asking)} nothing to learn from; observe some rows")
    checks.check_curvature(args.curvature, args.out)
    device = session.device(args.device)

    from logra_kernels.integrations import causal_lm, text_data

    rows = text_data.read_rows(args.data, args.text_field, args.id_field, args.source_field, args.limit)
    model, tokenizer = causal_lm.load(args.model, device)
    try:
        return _run(args, rows, model, tokenizer)
    except KeyboardInterrupt:
        return _interrupted(args)
    except StoreError as error:
        # The store speaks to programmers; here the way on is one command.
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise


def _run(args: argparse.Namespace, rows: list[TextRow], model: nn.Module, tokenizer: Any) -> int:
    from logra_kernels.projection import Projection
    from logra_kernels.run import Run

    longest = session.max_length(model, args.max_length)
    seconds: dict[str, float] = {}
    with Run(
        args.out,
        model,
        include=args.include,
        exclude=args.exclude,
        projection=Projection(args.rank, session.kinds(args.projection), args.seed),
        dtype=args.dtype,
        rank_c=args.rank_c,
        rows_per_shard=args.rows_per_shard,
        fingerprints=session.fingerprints(tokenizer, longest),
        curvature=args.curvature,
    ) as logging:
        checks.check_rank_c(args.rank_c, logging.taps.layers)
        before, first = _rows_there(logging, rows)
        if logging.learning or args.curvature in ("kfac", "ekfac"):
            with _timed(seconds, "observe"):
                _observe(logging, rows, model, tokenizer, longest, args)
        with _timed(seconds, "log"):
            cut = _log(logging, rows, first, model, tokenizer, longest, args)
        with _timed(seconds, "finalize"), session.progress_bar(2 * len(rows), 0, "finalize") as bar:
            logging.finalize(bar.update)
        _summarize(logging, before, seconds, args.out)
        if cut:
            print(f"cut       {cut:,} of the rows logged now, to {longest:,} positions; their rest does not count")
    return 0


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[what] = time.monotonic() - started


def _observe(
    logging: Run, rows: list[TextRow], model: nn.Module, tokenizer: Any, longest: int, args: argparse.Namespace
) -> None:
    """Forward and backward of a sample of the rows, the same one in every rerun."""
    import numpy as np

    from logra_kernels.integrations import causal_lm

    device = next(model.parameters()).device
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(rows))[: args.observe]
    sample = [rows[i] for i in sorted(order.tolist())]
    with session.progress_bar(len(sample), 0, "observe") as bar:
        for _, encoded in _batches(sample, tokenizer, longest, args):
            bar.update(len(encoded))
            batch = encoded.to(device)
            if args.nonfinite == "skip":
                batch = _finite(batch, model)
            if not len(batch):
                continue
            with logging.observe(weights=batch.attention_mask, sequence_length=batch.sequence_length):
                causal_lm.loss_sum(model, batch).backward()


def _batches(
    rows: list[TextRow], tokenizer: Any, longest: int, args: argparse.Namespace
) -> Iterator[tuple[list[int], Batch]]:
    from logra_kernels.integrations import causal_lm

    texts, ids = [row.text for row in rows], [row.id for row in rows]
    return causal_lm.batches_of_like_length(tokenizer, texts, args.batch_size, max_length=longest, ids=ids)


def _finite(batch: Batch, model: nn.Module) -> Batch:
    """The samples whose loss is neither NaN nor infinite; the others will not be logged either."""
    import torch

    from logra_kernels.integrations import causal_lm

    with torch.no_grad():
        nll, _ = causal_lm.losses(model, batch, nonfinite="keep")
    return batch.select(nll.isfinite().nonzero().flatten().tolist())


def _log(
    logging: Run,
    rows: list[TextRow],
    first: int,
    model: nn.Module,
    tokenizer: Any,
    longest: int,
    args: argparse.Namespace,
) -> int:
    """Log the rows from number `first` on; gives how many of them were cut to `longest` positions.

    Which rows share a batch depends on their numbers in the data alone, and not on where a rerun begins.

    Raises:
        KeyboardInterrupt: The user asked to stop.
    """
    size = session.window_rows(args.window, args.batch_size, logging.taps.layers)
    cut = 0
    with _Stop() as stop, session.progress_bar(len(rows), first, "log") as bar:
        for start in range(first // size * size, len(rows), size):
            window = rows[start : start + size]
            with logging.ordered([row.id for row in window]):
                for places, encoded in _batches(window, tokenizer, longest, args):
                    left = sum(start + place >= first for place in places)
                    if left:
                        stop.check()
                        _log_batch(logging, [window[place] for place in places], encoded, model, args)
                        bar.update(left)
                        cut += sum(c for place, c in zip(places, encoded.cut, strict=True) if start + place >= first)
    return cut


def _log_batch(logging: Run, batch: list[TextRow], encoded: Batch, model: nn.Module, args: argparse.Namespace) -> None:
    from logra_kernels.integrations import causal_lm

    columns = {"source": [row.source for row in batch]}
    if not args.no_text:
        columns["text"] = [row.text for row in batch]
    encoded = encoded.to(next(model.parameters()).device)
    length, kept = encoded.sequence_length, "keep" if args.nonfinite == "skip" else "raise"
    with logging.log(ids=encoded.ids, columns=columns, sequence_length=length, nonfinite=args.nonfinite):
        causal_lm.loss_sum(model, encoded, nonfinite=kept).backward()


class _Stop:
    """Inside the `with`, the first Ctrl-C only asks to stop after the batch at hand; a second one interrupts."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: It was asked for.
        """
        if self._asked:
            raise KeyboardInterrupt

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _rows_there(logging: Run, rows: list[TextRow]) -> tuple[int, int]:
    """How many rows the store holds already, and the number in the data of the first that is still to be logged.

    They must be the first rows of the data, but for those that were skipped or deleted.

    Raises:
        LograError: The store holds other rows: going on would mix two data sets in it.
    """
    from logra_kernels.store import GradientStore

    if not GradientStore.exists(logging.path):
        return 0, 0
    table, gone = logging.store.table, {*logging.skipped, *logging.store.deleted_ids}
    numbers: Sequence[int] = range(len(rows))
    if gone:
        numbers = [number for number, row in enumerate(rows) if row.id not in gone]
    both = min(len(table), len(numbers))
    for start in range(0, both, _COMPARED):
        here = [rows[number] for number in numbers[start : min(start + _COMPARED, both)]]
        _compare(logging.path, start, table.slice(start, len(here)), here)
    if len(table) > len(numbers):
        raise LograError(
            f"{logging.path} holds {len(table)} rows and the data only {len(numbers)};"
            " log other data into another --out"
        )
    return len(table), numbers[len(table)] if len(table) < len(numbers) else len(rows)


def _compare(path: str, first: int, stored: pa.Table, rows: list[TextRow]) -> None:
    """
    Raises:
        LograError: Rows of the store, from number `first` on, are not these of the data.
    """
    there, here = stored.column("id").to_pylist(), [row.id for row in rows]
    if there != here:
        at = next(i for i, name in enumerate(here) if there[i] != name)
        raise LograError(
            f"row {first + at + 1} of {path} is {there[at]!r} but of the data {here[at]!r}; "
            "log other data into another --out"
        )
    if "text" not in stored.column_names:
        return
    there, here = stored.column("text").to_pylist(), [row.text for row in rows]
    if there != here:
        name = next(row.id for row, text in zip(rows, there, strict=True) if row.text != text)
        raise LograError(f"the text of row {name!r} has changed since it was logged into {path}; use another --out")


def _interrupted(args: argparse.Namespace) -> int:
    print(f"logra: interrupted; what was logged is kept, go on with: {args.command_line}", file=sys.stderr)
    return 130


def _summarize(logging: Run, before: int, seconds: dict[str, float], out: str) -> None:
    store = logging.store
    new = len(store) - before
    rate = f", {new / seconds['log']:,.1f} rows/s" if new and seconds["log"] > 0 else ""
    print(f"store     {out}: {len(store):,} rows ({before:,} were there before)")
    if logging.skipped:
        print(f"skipped   {len(logging.skipped):,} rows whose gradient is NaN or infinite; `logra info` names them")
    print(f"row       {store.dim:,} numbers from {len(store.layers)} layers, {store.dtype}")
    print(f"size      {store.nbytes / 1e6:,.1f} MB in {session.shards(len(store.manifest.shards))}")
    if "observe" in seconds:
        print(f"observe   {seconds['observe']:.1f} s")
    print(f"log       {seconds['log']:.1f} s{rate}")
    print(f"finalize  {seconds['finalize']:.1f} s for curvature and self-influence")
