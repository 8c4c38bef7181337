"""The layout of a store directory and its manifest.

    manifest.json                          this file's `Manifest`, with its own checksum; replaced last, by rename
    origin.json                            the manifest of the empty store, from which `logra fsck` rebuilds a lost one
    rows-<start>-<stop>.safetensors        the tensors of `Manifest.tensors`, a line a row, row-major, immutable
    rows-<start>-<stop>.parquet            column "id" (string) and the user's columns, one line per row
    merged.json                            what a merge made the store from, with its own checksum
    deleted-<start>-<hash>.safetensors     tensor "rows" int64 [m], sorted: lines of that shard that are not shown
    sidecars/<name>.<key>.safetensors      what was computed from the rows; stale once the key differs
    sidecars/skipped.<zeros>.safetensors   ids of rows that were left out, see `store.skipped`
    sidecars/removed.<zeros>.safetensors   ids of deleted rows that are in no file any more, see `store.removed`
    lock                                   empty; flocked by the one writer

<start> and <stop> are serial numbers: the k-th row that was ever appended has number k, for ever. Appending fills a
shard up to rows_per_shard rows, and only the last may grow, so that a store that was only appended to has the rows
[i * rows_per_shard, (i + 1) * rows_per_shard) in shard i. A compaction writes a shard again without its deleted rows;
the names of its files then end in -v<version>. Rows that a user sees are numbered 0, 1, ... without gaps, in serial
order. Nothing in a store depends on time, machine or how the rows were batched, so equal rows give equal bytes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from logra_kernels.errors import StoreError
from logra_kernels.ops import FORMATS, MOST_RANK, RowFormat, factored_dim
from logra_kernels.store.durable import ZEROS, digest, seal, sealed_checksum, write_file
from logra_kernels.store.entry import Shard, is_row_file
from logra_kernels.store.tensorfile import Spec

FORMAT = "logra_kernels.store"
# 1 knew fp32 and bf16 rows only and no deleted ones, 2 no whitened ones, 3 no layers apart; all are read, and a store
# has the first that knows what it has
VERSION = 4
MANIFEST = "manifest.json"
ORIGIN = "origin.json"
SIDECARS = "sidecars"
PROJECTION_SIDECARS = ("projection", "projection-spread")  # of a learned projection
WHITENING = "whitening"  # the sidecar of whitened rows
LOCK = "lock"
MERGE_PLAN = "merge.json"  # beside rows without a manifest: a merge that is not finished
MERGED = "merged.json"  # the plan of one that is
SHARD_BYTES = 64 << 20
# Wide rows get longer shards, up to so many rows: one is scored at a time, and laying out the queries for it takes as
# long as scoring some hundred rows. 64 queries, D = 98,304, fp32: 3.9 GB/s from 170 rows, 5.3 from 512, 6.1 from 1,360.
SHARD_WIDE_ROWS, SHARD_WIDE_BYTES = 512, 256 << 20
SHARD_ROWS = 1 << 16  # so that the id table of a shard of very short rows stays small too

_BEFORE_CHECKSUM = b'{\n "checksum": "'


@dataclass(frozen=True)
class Layer:
    """One layer's part of a row: G [k_out, k_in] flattened, from number `offset` on."""

    name: str
    k_out: int
    k_in: int
    offset: int

    @property
    def part(self) -> slice:
        return slice(self.offset, self.offset + self.k_out * self.k_in)


@dataclass(frozen=True)
class Manifest:
    """What a store is and which rows it holds. A commit makes a new one.

    Attributes:
        rank: c, of each layer's factors that a row is kept as; None where it is kept as it is.
        apart: Whether each layer's numbers, or those of its factors, begin a block of their own, so that no scale is
            two layers'; what is left of a layer's last block means nothing, and a row is stored as `width` numbers.
            The numbers of u and v are then as large as each other, by their root mean square.
        whitened: `Whitening.facts` and its "digest", of rows that are kept whitened; else None.
        content: The `content_hash` that a compaction left as it was, because it shows the same rows.
        retired: Files that a compaction has replaced and that readers may still need.
    """

    layers: tuple[Layer, ...]
    format: RowFormat
    rows_per_shard: int
    projection: dict[str, Any] | None
    fingerprints: dict[str, str]
    meta: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    rank: int | None = None
    apart: bool = False
    whitened: dict[str, str] | None = None
    content: str | None = None
    retired: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return self.layers[-1].part.stop

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(k_out, k_in) of each layer."""
        return [(layer.k_out, layer.k_in) for layer in self.layers]

    @property
    def align(self) -> int:
        """Each layer's numbers begin at a multiple of it."""
        return self.format.block or 1 if self.apart else 1

    @property
    def width(self) -> int:
        """Numbers of a row as it is stored: `dim`, with what lies between layers, or those of its factors."""
        if self.rank is not None:
            return factored_dim(self.sizes, self.rank, self.align)
        return self.spans[-1][1].stop if self.apart else self.dim

    @cached_property
    def spans(self) -> list[tuple[slice, slice]]:
        """(columns of a row, or numbers of its factors side by side; where they are stored) where layers lie apart."""
        found: list[tuple[slice, slice]] = []
        widths, end = layer_widths(self.sizes, self.rank), 0
        for width, start in zip(widths, starts(widths, self.format), strict=True):
            first, place, end = end, start, end + width
            if found and found[-1][1].stop == start:
                first, place = (joined.start for joined in found.pop())
            found.append((slice(first, end), slice(place, start + width)))
        return found

    @cached_property
    def rows(self) -> int:
        """Rows that a reader sees."""
        return sum(shard.shown for shard in self.shards)

    @property
    def end(self) -> int:
        """The serial number of the next row."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def dtype(self) -> str:
        return self.format.name

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of decoded rows; those that factors stand for are fp32."""
        return self.format.value_dtype if self.rank is None else torch.float32

    @property
    def kept_as(self) -> str:
        """The number format, and of what."""
        factors = "" if self.rank is None else f", {self.rank} factors a layer"
        return f"{self.format}{factors}{'' if self.whitened is None else ', whitened'}"

    @property
    def irreplaceable(self) -> dict[str, str]:
        """Name -> key of the sidecars that no rows give again."""
        factors = (self.projection or {}).get("factors")
        found = dict.fromkeys(PROJECTION_SIDECARS, factors) if factors else {}
        return found if self.whitened is None else {**found, WHITENING: self.whitened["digest"]}

    def tensors(self, count: int) -> dict[str, Spec]:
        """What a shard of `count` rows holds, in the file's order: wider numbers first, which keeps all aligned."""
        rows = {"rows": Spec(self.format.code_dtype, (count, self.format.code_width(self.width)))}
        if not self.format.scaled:
            return rows
        return {"scales": Spec(self.format.scale_dtype, (count, self.format.scale_width(self.width)))} | rows

    @cached_property
    def row_bytes(self) -> int:
        """Of one stored row, ids and columns not counted."""
        return sum(spec.nbytes for spec in self.tensors(1).values())

    @cached_property
    def content_hash(self) -> str:
        """Names what the rows are: layers, dtype and the checksums of all shards, or what a compaction kept."""
        if self.content is not None:
            return self.content
        layers = json.dumps([[layer.name, layer.k_out, layer.k_in] for layer in self.layers])
        checksums = ["".join(file.checksum for file in shard.files) for shard in self.shards]
        return digest("\n".join([layers, self.kept_as, *checksums]).encode())

    def to_bytes(self) -> bytes:
        table: dict[str, Any] = {
            "checksum": ZEROS.decode(),
            "format": FORMAT,
            "version": 4 if self.apart else 2 if self.whitened is None else 3,
            "dtype": self.dtype,
            **({"block": self.format.block, "scale": self.format.scale} if self.format.scaled else {}),
            **({} if self.rank is None else {"rank_c": self.rank}),
            **({"layers_apart": True} if self.apart else {}),
            **({} if self.whitened is None else {"whitened": self.whitened}),
            "dim": self.dim,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "layers": [vars(layer) for layer in self.layers],
            "projection": self.projection,
            "fingerprints": self.fingerprints,
            "meta": self.meta,
        }
        if self.content is not None:
            table["content"] = self.content
        if self.retired:
            table["retired"] = self.retired
        head = json.dumps(table, indent=1).removesuffix("\n}")
        lines = ",\n  ".join(shard.line for shard in self.shards)
        return seal_text(f'{head},\n "shards": [\n  {lines}\n ]\n}}\n')


def seal_text(text: str) -> bytes:
    """JSON of an object whose first entry is "checksum", zeros, indented by one, with its checksum."""
    return seal(text.encode(), len(_BEFORE_CHECKSUM))[0]


def is_sealed(data: bytes) -> bool:
    """Whether it is what `seal_text` has given."""
    recorded, computed = sealed_checksum(memoryview(data), len(_BEFORE_CHECKSUM))
    return recorded == computed


def layer_widths(sizes: Sequence[tuple[int, int]], rank: int | None) -> list[int]:
    """Numbers of each layer of (k_out, k_in), or of its factors."""
    return [k_out * k_in if rank is None else rank * (k_out + k_in) for k_out, k_in in sizes]


def starts(widths: Sequence[int], form: RowFormat) -> list[int]:
    """Where layers of so many numbers are stored that lie apart: each on a multiple of the format's block."""
    assert form.block is not None
    found, end = [], 0
    for width in widths:
        found.append(-(-end // form.block) * form.block)
        end = found[-1] + width
    return found


def stored_width(widths: Sequence[int], form: RowFormat) -> int:
    """Numbers of a row as it is stored in a new store, of layers of so many (`layer_widths`)."""
    return starts(widths, form)[-1] + widths[-1] if form.scaled else sum(widths)


def default_rows_per_shard(width: int, form: RowFormat) -> int:
    row_bytes = form.row_bytes(width)
    wide = min(SHARD_WIDE_ROWS, SHARD_WIDE_BYTES // row_bytes)
    return max(1, wide, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def write_origin(directory: Path, manifest: Manifest) -> None:
    """Write what does not change with the rows, unless it is there."""
    if not (directory / ORIGIN).exists():
        write_file(directory, ORIGIN, [replace(manifest, shards=(), content=None, retired=()).to_bytes()])


def shard_bytes(dim: int, form: RowFormat) -> int:
    """Of a full shard's rows, by default."""
    return default_rows_per_shard(dim, form) * form.row_bytes(dim)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest."""
    write_file(directory, MANIFEST, [manifest.to_bytes()])


class NewerFormat(StoreError):  # noqa: N818 - the name says what it is; `except StoreError` catches it
    """The manifest is of a later logra_kernels."""


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of the store in `directory`, checked; or its `ORIGIN`.

    Raises:
        StoreError: No store there, a manifest that is damaged, or one of a newer format.
    """
    path = directory / name
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (directory / ORIGIN).exists():
            raise StoreError(
                f"{directory} has no {name}; rebuild it from the rows with `logra fsck --repair`, or create the store"
            ) from None
        raise StoreError(
            f"{directory} is not a gradient store (it has no {MANIFEST}); check the path, or create the store"
        ) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from None
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        table = json.loads(data)
    except ValueError:
        raise _damaged(path, "it is not valid JSON") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a gradient store, or is damaged; check the path")
    version = table.get("version")
    recorded, computed = sealed_checksum(memoryview(data), len(_BEFORE_CHECKSUM))
    sealed_like_ours = data.startswith(_BEFORE_CHECKSUM)  # then a version that is too high may be a damaged one
    if isinstance(version, int) and version > VERSION and (recorded == computed or not sealed_like_ours):
        raise NewerFormat(
            f"{path} has format version {version} and this logra_kernels reads up to {VERSION}; upgrade logra_kernels"
        )
    if recorded != computed:
        raise _damaged(path, "its checksum does not fit its content")
    dtype = table.get("dtype")
    if dtype not in FORMATS:
        known = ", ".join(FORMATS)
        raise NewerFormat(f"{path} names the dtype {dtype!r}, known here are {known}; upgrade logra_kernels")
    try:
        return _build(table)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it is inconsistent ({error})") from None


def _build(table: dict[str, Any]) -> Manifest:
    shards = tuple(Shard.of_entry(entry) for entry in table["shards"])
    end = 0
    for shard in shards:
        shard.check()
        if shard.start < end:
            raise ValueError(f"shard {shard.start} does not follow the one before it")
        end = shard.stop
    if not all(is_row_file(name) for name in table.get("retired", ())):
        raise ValueError("it retires files that are not of a store")
    layers = tuple(Layer(**layer) for layer in table["layers"])
    ends = [layer.part.stop for layer in layers]
    if not ends or [0, *ends] != [*(layer.offset for layer in layers), table["dim"]]:
        raise ValueError("the layers do not fill a row")
    rank = table.get("rank_c")
    if rank is not None and (type(rank) is not int or not 1 <= rank <= MOST_RANK):
        raise ValueError(f"it keeps factors of rank {rank!r}")
    apart = table.get("layers_apart", False)
    if apart is not False and (apart is not True or "block" not in table):
        raise ValueError("its layers cannot lie apart")
    whitened = table.get("whitened")
    if whitened is not None and not re.fullmatch(r"[0-9a-f]{32}", whitened["digest"]):
        raise ValueError("it does not name what its rows are whitened by")
    return Manifest(
        layers=layers,
        format=RowFormat.of(table["dtype"], table.get("block"), table.get("scale")),
        rows_per_shard=table["rows_per_shard"],
        projection=table["projection"],
        fingerprints=table["fingerprints"],
        meta=table["meta"],
        shards=shards,
        rank=rank,
        apart=apart,
        whitened=whitened,
        content=table.get("content"),
        retired=tuple(table.get("retired", ())),
    )


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; restore it from a copy, or rebuild it with `logra fsck --repair`")
