"""The layout of a store directory and its manifest.

    manifest.json                          this file's `Manifest`, with its own checksum; replaced last, by rename
    rows-<start>-<stop>.safetensors        the tensors of `Manifest.tensors`, a line a row, row-major, immutable
    rows-<start>-<stop>.parquet            column "id" (string) and the user's columns, one line per row
    sidecars/<name>.<key>.safetensors      what was computed from the rows; stale once the key differs
    lock                                   empty; flocked by the one writer

Shard i holds the rows [i * rows_per_shard, (i + 1) * rows_per_shard); only the last may be shorter. Nothing in a store
depends on time, machine or how the rows were batched, so equal rows give equal bytes.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from logra_kernels.errors import StoreError
from logra_kernels.ops import FORMATS, RowFormat
from logra_kernels.store.durable import ZEROS, digest, seal, sealed_checksum, write_file
from logra_kernels.store.tensorfile import Spec

FORMAT = "logra_kernels.store"
VERSION = 2  # 1 knew fp32 and bf16 rows only, and is read
MANIFEST = "manifest.json"
SIDECARS = "sidecars"
LOCK = "lock"
SHARD_BYTES = 64 << 20
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
class File:
    """An immutable file of the store: name, length in bytes, xxh3_128."""

    name: str
    nbytes: int
    checksum: str


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of the store and the two files that hold them."""

    start: int
    stop: int
    rows: File
    columns: File

    @property
    def names(self) -> tuple[str, str]:
        return self.rows.name, self.columns.name

    @cached_property
    def line(self) -> str:
        """The shard's line in the manifest; kept, because every commit writes all of them."""
        files = {
            key: {"file": file.name, "bytes": file.nbytes, "checksum": file.checksum}
            for key, file in (("rows", self.rows), ("columns", self.columns))
        }
        return json.dumps({"start": self.start, "stop": self.stop, **files}, separators=(",", ":"))


def shard_names(start: int, stop: int) -> tuple[str, str]:
    stem = f"rows-{start:012d}-{stop:012d}"
    return f"{stem}.safetensors", f"{stem}.parquet"


def is_shard_name(name: str) -> bool:
    return re.fullmatch(r"rows-\d{12,}-\d{12,}\.(safetensors|parquet)", name) is not None


@dataclass(frozen=True)
class Manifest:
    """What a store is and which rows it holds. A commit makes a new one."""

    layers: tuple[Layer, ...]
    format: RowFormat
    rows_per_shard: int
    projection: dict[str, Any] | None
    fingerprints: dict[str, str]
    meta: dict[str, Any]
    shards: tuple[Shard, ...] = ()

    @property
    def dim(self) -> int:
        return self.layers[-1].part.stop

    @property
    def rows(self) -> int:
        return self.shards[-1].stop if self.shards else 0

    @property
    def dtype(self) -> str:
        return self.format.name

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of decoded rows."""
        return self.format.value_dtype

    def tensors(self, count: int) -> dict[str, Spec]:
        """What a shard of `count` rows holds, in the file's order: wider numbers first, which keeps all aligned."""
        rows = {"rows": Spec(self.format.code_dtype, (count, self.format.code_width(self.dim)))}
        if not self.format.scaled:
            return rows
        return {"scales": Spec(self.format.scale_dtype, (count, self.format.scale_width(self.dim)))} | rows

    @property
    def row_bytes(self) -> int:
        """Of one stored row, ids and columns not counted."""
        return sum(spec.nbytes for spec in self.tensors(1).values())

    @cached_property
    def content_hash(self) -> str:
        """Names what the rows are: layers, dtype and the checksums of all shards."""
        layers = json.dumps([[layer.name, layer.k_out, layer.k_in] for layer in self.layers])
        checksums = [f"{shard.rows.checksum}{shard.columns.checksum}" for shard in self.shards]
        return digest("\n".join([layers, str(self.format), *checksums]).encode())

    def to_bytes(self) -> bytes:
        table = {
            "checksum": ZEROS.decode(),
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            **({"block": self.format.block, "scale": self.format.scale} if self.format.scaled else {}),
            "dim": self.dim,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "layers": [vars(layer) for layer in self.layers],
            "projection": self.projection,
            "fingerprints": self.fingerprints,
            "meta": self.meta,
        }
        head = json.dumps(table, indent=1).removesuffix("\n}")
        lines = ",\n  ".join(shard.line for shard in self.shards)
        text = f'{head},\n "shards": [\n  {lines}\n ]\n}}\n'
        return seal(text.encode(), len(_BEFORE_CHECKSUM))[0]


def default_rows_per_shard(dim: int, form: RowFormat) -> int:
    return max(1, min(SHARD_ROWS, SHARD_BYTES // form.row_bytes(dim)))


def write_manifest(directory: Path, manifest: Manifest) -> int:
    """Replace the manifest; how many bytes it has."""
    data = manifest.to_bytes()
    write_file(directory, MANIFEST, [data])
    return len(data)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the store in `directory`, checked.

    Raises:
        StoreError: No store there, a manifest that is damaged, or one of a newer format.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
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
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{path} has format version {version} and this logra_kernels reads up to {VERSION}; upgrade logra_kernels"
        )
    recorded, computed = sealed_checksum(memoryview(data), len(_BEFORE_CHECKSUM))
    if recorded != computed:
        raise _damaged(path, "its checksum does not fit its content")
    dtype = table.get("dtype")
    if dtype not in FORMATS:
        known = ", ".join(FORMATS)
        raise StoreError(f"{path} names the dtype {dtype!r}, known here are {known}; upgrade logra_kernels")
    try:
        return _build(table)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it is inconsistent ({error})") from None


def _build(table: dict[str, Any]) -> Manifest:
    shards = tuple(
        Shard(
            entry["start"],
            entry["stop"],
            *(File(entry[k]["file"], entry[k]["bytes"], entry[k]["checksum"]) for k in ("rows", "columns")),
        )
        for entry in table["shards"]
    )
    for index, shard in enumerate(shards):
        start = index * table["rows_per_shard"]
        full = start + table["rows_per_shard"]
        last = index == len(shards) - 1
        fits = shard.start == start and (start < shard.stop <= full if last else shard.stop == full)
        if not fits or shard.names != shard_names(shard.start, shard.stop):
            raise ValueError(f"shard {index} does not follow the one before it")
    layers = tuple(Layer(**layer) for layer in table["layers"])
    ends = [layer.part.stop for layer in layers]
    if not ends or [0, *ends] != [*(layer.offset for layer in layers), table["dim"]]:
        raise ValueError("the layers do not fill a row")
    return Manifest(
        layers=layers,
        format=RowFormat.of(table["dtype"], table.get("block"), table.get("scale")),
        rows_per_shard=table["rows_per_shard"],
        projection=table["projection"],
        fingerprints=table["fingerprints"],
        meta=table["meta"],
        shards=shards,
    )


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; restore it from a copy, or remove the store and log again")
