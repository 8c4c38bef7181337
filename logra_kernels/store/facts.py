"""What a store is, apart from its rows: the facts of its manifest, and the sidecars beside it."""

import errno
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.ops import RowFormat
from logra_kernels.store import sidecar
from logra_kernels.store.fingerprint import check_fingerprints
from logra_kernels.store.format import WHITENING, Manifest
from logra_kernels.store.whitening import Whitening

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class Facts(ABC):
    """The half of `GradientStore` that needs no row."""

    @property
    @abstractmethod
    def path(self) -> Path: ...

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """The manifest whose rows are shown."""

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """name -> (k_out, k_in), in row order."""
        return {layer.name: (layer.k_out, layer.k_in) for layer in self.manifest.layers}

    @property
    def slices(self) -> dict[str, slice]:
        """name -> the layer's part of a row."""
        return {layer.name: layer.part for layer in self.manifest.layers}

    @property
    def dim(self) -> int:
        """D, numbers in a row."""
        return self.manifest.dim

    @property
    def dtype(self) -> str:
        return self.manifest.dtype

    @property
    def format(self) -> RowFormat:
        """The number format of the stored rows."""
        return self.manifest.format

    @property
    def rank_c(self) -> int | None:
        """Factors of each layer that a row is kept as; None where rows are kept as they are."""
        return self.manifest.rank

    @cached_property
    def whitening(self) -> Whitening | None:
        """What rows and queries are whitened by; None for a store of gradients as they are.

        Raises:
            StoreError: It is missing or damaged.
        """
        facts = self.manifest.whitened
        if facts is None:
            return None
        kept = sidecar.read_sidecar(self.path, WHITENING, facts["digest"])
        if kept is None:
            raise StoreError(
                f"{self.path} lacks what its rows were whitened by,"
                f" sidecars/{WHITENING}.{facts['digest']}.safetensors;"
                " restore it from a copy of the store, or whiten the rows it was made from again"
            )
        found = Whitening({name: kept[0][name] for name in self.layers}, kept[1])
        found.check(self.layers)
        return found

    @property
    def projection(self) -> dict[str, Any] | None:
        return self.manifest.projection

    @property
    def fingerprints(self) -> dict[str, str]:
        return dict(self.manifest.fingerprints)

    @property
    def meta(self) -> dict[str, Any]:
        return dict(self.manifest.meta)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards on disk."""
        return sum(shard.rows.nbytes + shard.columns.nbytes for shard in self.manifest.shards)

    @property
    def content_hash(self) -> str:
        """Hash of layers, dtype and every committed row and column; what is computed from the rows is named by it."""
        return self.manifest.content_hash

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse to be used for something else than what the rows were made from.

        Raises:
            StoreMismatch: Lists every entry that differs or is missing on either side.
        """
        check_fingerprints(str(self.path), self.fingerprints, fingerprints)

    def sidecar_write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> Path:
        """Keep tensors that were computed from the rows, in place of older ones of that name.

        Args:
            name: Letters, digits, '_' and '-'.
            tensors: Any devices; fp64 to bf16, int64, int32, int8, uint8 or bool.
            metadata: JSON data.
            key: The hash (hex) of what they were computed from; `content_hash` by default.

        Raises:
            StoreError: An argument is wrong, or the disk refuses.
        """
        return sidecar.write_sidecar(self.path, name, key or self.content_hash, tensors, metadata or {})

    def sidecar_keep(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> None:
        """`sidecar_write`, of what can be computed again: where nobody may write, a warning says that it is not kept.

        Raises:
            StoreError: As `sidecar_write`, for other reasons.
        """
        try:
            self.sidecar_write(name, tensors, metadata, key=key)
        except StoreError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _UNWRITABLE:
                raise
            warnings.warn(
                f"{self.path} cannot be written to ({error.__cause__.strerror}): what is computed from its rows is not"
                " kept, and will be computed again",
                stacklevel=2,
            )

    def sidecar_read(self, name: str, *, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, metadata) of a sidecar, or None when there is none or it was computed from other rows.

        Raises:
            StoreError: The file is damaged.
        """
        return sidecar.read_sidecar(self.path, name, key or self.content_hash)
