"""Sidecars: tensors computed from the rows (curvature, self-influence), kept beside them and dropped when stale."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.durable import TEMPORARY, remove_files, sealed_checksum, sync_directory, write_file
from logra_kernels.store.format import SIDECARS
from logra_kernels.store.tensorfile import CHECKSUM_AT, TAGS, Spec, as_bytes, map_file, parse_header, sealed_file, view

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{16,}")


def write_sidecar(store: Path, name: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write `sidecars/<name>.<key>.safetensors` and remove those of the same name and another key.

    Raises:
        StoreError: A bad name, key, dtype or metadata; or the disk refuses.
    """
    file = _file_name(name, key)
    directory = store / SIDECARS
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # keeps each one aligned
    held = {entry: tensor.detach().cpu().contiguous() for entry, tensor in ordered}
    for entry, tensor in held.items():
        if tensor.dtype not in TAGS:
            raise StoreError(
                f"sidecar {name!r}: tensor {entry!r} is {tensor.dtype}, which cannot be stored; convert it"
            )
    try:
        text = json.dumps(dict(metadata), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"sidecar {name!r}: the metadata is not JSON ({error}); use strings, numbers and lists"
        ) from None
    specs = {entry: Spec(tensor.dtype, tuple(tensor.shape)) for entry, tensor in held.items()}
    labels = {"key": key, "metadata": text}
    chunks, _ = sealed_file(specs, labels, [as_bytes(tensor) for tensor in held.values() if tensor.numel()])
    try:
        directory.mkdir(exist_ok=True)
        with _alone(directory):
            write_file(directory, file, chunks)
            sync_directory(directory)
            sync_directory(store)
            remove_files(directory, [old.name for old in directory.glob(f"{name}.*.safetensors") if old.name != file])
    except OSError as error:
        raise StoreError(
            f"writing {directory / file} failed: {error.strerror}; the rows are not touched;"
            " remove the cause and try again"
        ) from error
    return directory / file


def read_sidecar(store: Path, name: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors on privately mapped pages, metadata), or None when there is none for this key.

    Raises:
        StoreError: The file is damaged.
    """
    path = store / SIDECARS / _file_name(name, key)
    try:
        mapping = map_file(path, CHECKSUM_AT + 32)
        with memoryview(mapping) as data:
            recorded, computed = sealed_checksum(data, CHECKSUM_AT)
            if recorded != computed:
                raise ValueError("its checksum does not fit its content")
            entries, labels = parse_header(data)
        if labels["key"] != key:
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check permissions and the disk") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error}; remove it, and it is computed again") from None
    return {entry: view(mapping, spec, offset) for entry, (spec, offset) in entries.items()}, json.loads(
        labels["metadata"]
    )


def remove_temporaries(store: Path) -> None:
    """Remove what writers that died have left."""
    with contextlib.suppress(FileNotFoundError), _alone(store / SIDECARS):
        pass


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory against other processes' writers; temporaries in it were left by writers that died, and go."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        remove_files(directory, [path.name for path in directory.glob(f"{TEMPORARY}*")])
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # by itself, closing would leave it to a forked child's copy
        os.close(fd)


def _file_name(name: str, key: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name a sidecar; use letters, digits, '_' and '-'")
    if not _KEY.fullmatch(key):
        raise StoreError(f"{key!r} cannot be a sidecar's key; give a hash in hex")
    return f"{name}.{key}.safetensors"
