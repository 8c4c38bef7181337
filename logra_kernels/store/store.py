"""GradientStore: projected gradients on disk, one row a sample, appended in order and scored in one pass."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.durable import TEMPORARY, remove_files, sync_directory
from logra_kernels.store.format import ORIGIN, WHITENING, Manifest, read_manifest, write_manifest, write_origin
from logra_kernels.store.ids import UNKNOWN
from logra_kernels.store.life.compact import remove_retired
from logra_kernels.store.life.export import export
from logra_kernels.store.lock import ReaderLease, WriterLock
from logra_kernels.store.reading.reader import Reader
from logra_kernels.store.reading.searched import SearchedRows
from logra_kernels.store.sidecar import write_sidecar
from logra_kernels.store.whitening import Whitening
from logra_kernels.store.writing.append import Appender
from logra_kernels.store.writing.create import check_free, new_manifest, remove_leftovers, store_exists


class GradientStore(SearchedRows):
    """A directory of rows. Made by `create` and `open`; a context manager.

    Opened for reading it shows the rows that were committed at that moment. Opened for appending it is the one writer,
    and shows what it has committed so far (`flush` commits everything).
    """

    def __init__(self, directory: Path, writer: Appender | None):
        self._directory = directory
        self._appender = writer
        self._lease = ReaderLease(directory) if writer is None else None  # before the manifest is read
        self._reader = Reader(directory, self._load)
        self._closed = False

    # --- making one ---

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        layers: Mapping[str, tuple[int, int]],
        dtype: str = "fp32",
        *,
        block: int | None = None,
        scale: str | None = None,
        projection: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        rows_per_shard: int | None = None,
        meta: Mapping[str, Any] | None = None,
        rank_c: int | None = None,
        sidecars: Mapping[str, tuple[str, Mapping[str, Tensor]]] | None = None,
        whitening: Whitening | None = None,
    ) -> "GradientStore":
        """Make an empty store, open for appending.

        Args:
            path: A directory that is new, empty, or left by a creation that was interrupted.
            layers: name -> (k_out, k_in), in the order in which they lie in a row; D is the sum of k_out * k_in.
            dtype: Of the stored numbers: fp32, bf16, fp16, fp8, int8, int4, int2 or sign (`ops.RowFormat`).
            block: Numbers that share a scale, for fp8 and below; 128 by default. No two layers share one: what is left
                of a layer's last block is filled up.
            scale: Of those scales, "fp32" (the default) or "fp16".
            projection: How the rows were projected, as JSON data.
            fingerprints: What the rows belong to (model, tokenizer, data, loss, ...), for `check`.
            rows_per_shard: By default 64 MB a shard; of wide rows up to 512, or 256 MB.
            meta: Anything else to keep, as JSON data.
            rank_c: Keep of each layer's G [k_out, k_in] the best approximation by so many factors, 1 to 8, which takes
                rank_c * (k_out + k_in) numbers (LoRIF, arXiv 2601.21929); None keeps all k_out * k_in.
            sidecars: name -> (key, tensors) of sidecars that are there before the first row is, as the factors of a
                projection that no seed gives again.
            whitening: The rows to come are whitened by it (`Whitening.apply`), and so must queries be.

        Raises:
            StoreError: There is a store already, something else lies there, or an argument is wrong.
        """
        manifest = new_manifest(
            layers, dtype, block, scale, projection, fingerprints, rows_per_shard, meta, rank_c, whitening
        )
        directory = Path(path)
        check_free(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{directory} cannot be created: {error.strerror}; check the path and permissions"
            ) from None
        lock = WriterLock(directory)
        try:
            check_free(directory)  # again, now that no other process can create it
            remove_files(directory, [entry.name for entry in directory.glob(f"{TEMPORARY}*")])
            for name, (key, tensors) in (sidecars or {}).items():
                write_sidecar(directory, name, key, tensors, {})
            if whitening is not None:
                write_sidecar(directory, WHITENING, whitening.digest, whitening.maps, whitening.facts)
            remove_files(directory, [ORIGIN])  # of a creation that was interrupted
            write_origin(directory, manifest)
            write_manifest(directory, manifest)
            sync_directory(directory)
            sync_directory(directory.absolute().parent)
            return cls(directory, Appender(directory, manifest, lock))
        except OSError as error:
            lock.release()
            raise StoreError(
                f"{directory} cannot be created: {error.strerror}; remove the cause and try again"
            ) from error
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike, mode: str = "read") -> "GradientStore":
        """Open a store.

        Args:
            path: Its directory.
            mode: "read" (any number of processes, also while one appends) or "append" (one at a time).

        Raises:
            StoreError: No store there, a damaged one, one of a newer format, or another writer has it.
        """
        directory = Path(path)
        if mode == "read":
            return cls(directory, None)
        if mode != "append":
            raise StoreError(f"a store cannot be opened with mode={mode!r}; use 'read' or 'append'")
        read_manifest(directory)  # before the lock file is made: the path may not be a store
        lock = WriterLock(directory)
        try:
            manifest = remove_retired(directory, read_manifest(directory))
            remove_leftovers(directory, manifest)
            write_origin(directory, manifest)
            return cls(directory, Appender(directory, manifest, lock))
        except OSError as error:
            lock.release()
            raise StoreError(
                f"{directory} cannot be opened: {error.strerror}; check permissions and the disk"
            ) from error
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def exists(path: str | os.PathLike) -> bool:
        """Whether a store (whole or damaged) is at `path`."""
        return store_exists(Path(path))

    # --- writing ---

    def append(
        self,
        rows: Tensor,
        ids: Sequence[str],
        columns: Mapping[str, Any] | None = None,
        *,
        skip_committed: bool = False,
    ) -> int:
        """Queue rows for the background writer; they are converted and copied before this returns.

        Args:
            rows: [N, D], any floating dtype, CPU or CUDA, any strides.
            ids: N strings, each new to the store.
            columns: name -> N values; the same names and types in every append of a store.
            skip_committed: Leave out leading rows that were committed before the store was opened, so that a rerun may
                pass whole batches again. They must come in the stored order.

        Returns:
            How many rows were queued: N, less those left out.

        Raises:
            StoreError: Rows, ids or columns do not fit, or hold NaN or Inf (then none of this append is stored and the
                store goes on); or the writer has failed (then the message says what is committed). Rows of a CUDA
                device are still on their way when this returns: NaN or Inf in them is such a failure, told later.
        """
        return self._writing().append(rows, ids, columns, skip_committed)

    def flush(self) -> None:
        """Commit every row appended so far.

        Raises:
            StoreError: The writer has failed.
        """
        self._writing().writer.flush()

    def delete(self, ids: Iterable[str], *, missing_ok: bool = False) -> int:
        """Take rows out, all in one commit: nothing that is opened or computed from now on sees them.

        They stay in their files until `compact`, and until then their ids stay taken: a rerun of the logging passes
        over them. `content_hash` changes, so what was computed from the rows is computed again.

        Args:
            ids: Of stored rows; ids that were deleted before count for nothing.
            missing_ok: Pass over ids that the store does not have.

        Returns:
            How many rows were deleted.

        Raises:
            StoreError: Ids that the store does not have (then none is deleted), or the disk refuses.
        """
        return self._writing().delete(ids, missing_ok)

    def compact(self, *, release_ids: bool = False) -> int:
        """Write shards with deleted rows again without them; the rows that are shown stay the same, and so does
        `content_hash`. Readers that are open go on with the old files, which the next writer removes.

        Args:
            release_ids: Forget which rows were deleted, of all the store's time, so that their ids can be used again;
                else a list of them stays, and a rerun of the logging does not bring the rows back.

        Returns:
            How many deleted rows were taken out of the files.

        Raises:
            StoreError: A shard is damaged, or the disk refuses; the rows are intact, and compacting again goes on.
        """
        return self._writing().compact(release_ids)

    def close(self) -> None:
        """Commit what was appended and let the store go; a second call does nothing. Reading goes on working.

        Raises:
            StoreError: The writer has failed, and no earlier call has said so.
        """
        if self._appender is not None and not self._closed:
            try:
                self._appender.close()
            except KeyboardInterrupt:  # the writer is still at work: it keeps the lock, and a second close waits again
                raise
            except BaseException:
                self._closed = True
                raise
        self._closed = True

    def __enter__(self) -> "GradientStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writing(self) -> "Appender":
        if self._appender is None:
            raise StoreError(f"{self._directory} is open for reading; open it with mode='append'")
        if self._closed:
            raise StoreError(f"{self._directory} was closed; open it with mode='append'")
        return self._appender

    # --- what it is ---

    @property
    def path(self) -> Path:
        return self._directory

    @property
    def manifest(self) -> Manifest:
        """The manifest whose rows are shown."""
        return self._appender.writer.manifest if self._appender is not None else self._reader.manifest

    def committed(self, name: str) -> bool:
        """Whether the row with this id is committed."""
        if self._appender is None:
            return name in self._reader.known
        return self._appender.is_committed(name)

    def taken(self, ids: Sequence[str]) -> bool:
        """Whether every row with one of these ids is committed, or was deleted: a rerun of the logging passes over
        it."""
        known = self._reader.known if self._appender is None else self._appender.known
        numbers = known.numbers(list(ids))
        return bool(((numbers != UNKNOWN) & (numbers < len(self))).all())

    def export(self, path: str | os.PathLike, format: str = "npy") -> Path:
        """Write all rows, their ids and columns for other tools.

        Args:
            path: A new directory.
            format: "npy" (rows.npy fp32 and columns.parquet), "faiss" (index.faiss, inner product) or "datasets"
                (Hugging Face; column "gradient").

        Raises:
            StoreError: An unknown format, its package is missing, something is at the path, or the disk refuses.
        """
        return export(self, path, format)

    def _load(self) -> Manifest:
        return self._appender.writer.manifest if self._appender is not None else read_manifest(self._directory)

    def _current(self) -> Reader:
        """The reader of the newest manifest this object may show."""
        if self._appender is not None and self._appender.writer.manifest is not self._reader.manifest:
            self._reader = Reader(self._directory, self._load, self._reader)
        return self._reader
