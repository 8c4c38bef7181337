"""Rows for other tools: NumPy, FAISS, Hugging Face datasets.

    npy         rows.npy [N, D] fp32            columns.parquet: column "id" and the user's, a line a row
    faiss       index.faiss, an IndexFlatIP     columns.parquet
    datasets    a dataset of `datasets.load_from_disk`: "id", the user's columns, "gradient" [D] fp32

Each appears whole or not at all: it is made beside its place and moved there at the end.
"""

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import to_parquet
from logra_kernels.store.durable import TEMPORARY, sync, sync_directory
from logra_kernels.store.reading.stored import StoredRows
from logra_kernels.store.tensorfile import as_bytes

GRADIENT = "gradient"


def export(store: StoredRows, path: str | os.PathLike, format: str) -> Path:
    """Write all rows of a store to a new directory in a format of `FORMATS`.

    Raises:
        StoreError: An unknown format, its package is not installed, something is at the path, the disk refuses, or a
            shard is damaged.
    """
    if format not in FORMATS:
        raise StoreError(f"export: format is {format!r}; it must be one of {', '.join(FORMATS)}")
    target = Path(path)
    if target.exists():
        raise StoreError(f"export: {target} exists; choose a new directory")
    scratch = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
    try:
        scratch.mkdir(parents=True)
        FORMATS[format](store, scratch)
        for file in scratch.rglob("*"):
            sync(file)
        scratch.rename(target)
        sync_directory(target.absolute().parent)
    except OSError as error:
        raise StoreError(
            f"export to {target} failed: {error.strerror or error}; remove the cause and try again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _to_npy(store: StoredRows, directory: Path) -> None:
    shape = (len(store), store.dim)
    with open(directory / "rows.npy", "wb") as out:  # not a mapping: on a full disk that would end the process
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _, rows in store.blocks():
            out.write(as_bytes(rows.float().contiguous()))
    (directory / "columns.parquet").write_bytes(to_parquet(store.table))


def _to_faiss(store: StoredRows, directory: Path) -> None:
    faiss = _needed("faiss", "faiss-cpu")
    index = faiss.IndexFlatIP(store.dim)
    for _, rows in store.blocks():
        index.add(rows.float().numpy())
    try:
        faiss.write_index(index, str(directory / "index.faiss"))
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error
    (directory / "columns.parquet").write_bytes(to_parquet(store.table))


def _to_datasets(store: StoredRows, directory: Path) -> None:
    datasets = _needed("datasets", "datasets")
    if GRADIENT in store.table.column_names:
        raise StoreError(f"export: the store has a column {GRADIENT!r} of its own; export to npy instead")

    kind = pa.list_(pa.float32(), store.dim)
    schema = store.table.schema.append(pa.field(GRADIENT, kind))
    place = directory / "stream"  # a dataset cannot be saved into the directory that it is read from
    place.mkdir()
    stream = place / "rows.arrow"
    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for start, rows in store.blocks():
            flat = pa.array(rows.float().numpy().reshape(-1))
            gradients = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            out.write_table(store.table.slice(start, len(rows)).append_column(schema.field(GRADIENT), gradients))
    datasets.Dataset.from_file(str(stream)).save_to_disk(str(directory), num_shards=None if len(store) else 1)
    shutil.rmtree(place)


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StoreError(f"export needs the package {package}; pip install 'logra-kernels[export]'") from error


FORMATS = {"npy": _to_npy, "faiss": _to_faiss, "datasets": _to_datasets}
