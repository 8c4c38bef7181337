"""`logra info`: what a store holds and whether it is intact."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from logra_kernels.cli import session
from logra_kernels.cli.quantize import describe

if TYPE_CHECKING:
    from logra_kernels.store import GradientStore

SIDECARS = "sidecars"
SHOWN_LAYERS = 40
SHOWN_SKIPPED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument("--verify", action="store_true", help="read every shard and compare its checksum")


def run(args: argparse.Namespace) -> int:
    """Print the store's facts; with `--verify` read all of it."""
    from logra_kernels.store import GradientStore

    store = GradientStore.open(args.store)
    _print_facts(store)
    if args.verify:
        _verify(store)
    return 0


def _print_facts(store: GradientStore) -> None:
    from logra_kernels.store import known_zero_layers, quantization_loss, read_skipped

    shards, per_shard = store.manifest.shards, store.manifest.rows_per_shard
    print(f"store           {store.path}")
    hidden = sum(shard.hidden for shard in shards)
    deleted = f", and {hidden:,} deleted ones that `logra compact` takes out of the files" if hidden else ""
    print(f"rows            {len(store):,}{deleted}")
    print(f"row             {store.dim:,} numbers, {store.manifest.kept_as}: {store.manifest.row_bytes:,} bytes")
    print(f"size            {store.nbytes / 1e6:,.1f} MB in {session.shards(len(shards))} of up to {per_shard:,} rows")
    skipped = read_skipped(store.path)
    if skipped:
        more = f" and {len(skipped) - SHOWN_SKIPPED} more" if len(skipped) > SHOWN_SKIPPED else ""
        print(f"skipped         {len(skipped):,} rows of NaN or infinity: {', '.join(skipped[:SHOWN_SKIPPED])}{more}")
    print(f"columns         {', '.join(store.table.column_names)}")
    projection = store.projection or {}
    print(f"projection      {', '.join(f'{name} {value}' for name, value in projection.items()) or 'none'}")
    for name, value in sorted(store.fingerprints.items()):
        print(f"{name:<15} {value}")
    if store.whitening is not None:
        print(f"whitened by     {', '.join(f'{name} {value}' for name, value in store.whitening.facts.items())}")
    loss = quantization_loss(store)
    if loss is not None:
        print(f"quantised       {describe(loss, len(store))}")
    print(f"computed        {', '.join(_computed(store)) or 'nothing yet: no curvature, no self-influence'}")
    if "index" in _computed(store):
        index = store.index
        share = index.recall[index.shortlist]
        print(
            f"search index    {index.dims:,} numbers a row, {index.dtype}; of the {index.k} best rows of"
            f" {index.queries} queries ({session.of_rows(index.k, len(store))}) {share:.1%} were among"
            f" {index.shortlist:,}"
        )
    print(f"layers          {len(store.layers)}")
    zero = known_zero_layers(store) or ()
    for name, (k_out, k_in) in list(store.layers.items())[:SHOWN_LAYERS]:
        print(f"  {k_out:>4} x {k_in:<4}  {name}{'   all zero' if name in zero else ''}")
    if len(store.layers) > SHOWN_LAYERS:
        print(f"  ... and {len(store.layers) - SHOWN_LAYERS} more")


def _computed(store: GradientStore) -> list[str]:
    """Names of the sidecars (curvature, self-influence) that belong to the rows as they are now."""
    files = (store.path / SIDECARS).glob(f"*.{store.content_hash}.safetensors")
    return sorted(file.name.partition(".")[0] for file in files)


def _verify(store: GradientStore) -> None:
    """Every shard's rows and columns are read, which compares their checksums.

    Raises:
        StoreError: A shard is damaged or missing.
    """
    rows = store.table.num_rows
    with session.progress_bar(rows, 0, "verify") as bar:
        for _, block in store.blocks():
            bar.update(len(block))
    print(f"verified        {session.shards(len(store.manifest.shards))}, every checksum fits")
