"""Row ids and user columns: from Python lists to an Arrow table, and to Parquet bytes."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain, groupby
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from logra_kernels.errors import StoreError
from logra_kernels.store.arrow import strings
from logra_kernels.store.durable import ZEROS, seal, sealed_checksum
from logra_kernels.store.ids import all_str

ID = "id"
_CHECKSUM = "checksum"
_IS = pa.types
_FAMILIES: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "truth": (_IS.is_boolean,),
    "number": (_IS.is_integer, _IS.is_floating, _IS.is_decimal),
    "text": (_IS.is_string, _IS.is_large_string, _IS.is_string_view),
    "bytes": (_IS.is_binary, _IS.is_large_binary, _IS.is_fixed_size_binary, _IS.is_binary_view),
    "time": (_IS.is_timestamp, _IS.is_date),
    "time of day": (_IS.is_time,),
    "duration": (_IS.is_duration,),
}

Lines: TypeAlias = (
    pa.Table | list[str]
)  # ids and columns of rows, a line each; of rows without columns also the ids alone


def build_lines(ids: list[str], columns: Mapping[str, Any] | None, schema: pa.Schema | None) -> Lines:
    """What `build_table` gives, or stands for it: a table takes longer than all else that is done for short rows. What
    is in the ids is looked at later."""
    if columns or schema is None or len(schema.names) > 1:
        return build_table(ids, columns, schema)
    return ids


def lines_between(lines: Lines, start: int, stop: int) -> Lines:
    return lines[start:stop] if isinstance(lines, list) else lines.slice(start, stop - start)


def table_of(parts: Iterable[Lines]) -> pa.Table:
    """All lines as one table."""
    tables: list[pa.Table] = []
    for plain, group in groupby(parts, lambda part: isinstance(part, list)):
        if plain:
            tables.append(pa.table([strings(list(chain.from_iterable(group)))], names=[ID]))
        else:
            tables += group
    return pa.concat_tables(tables)


def build_table(ids: Sequence[str], columns: Mapping[str, Any] | None, schema: pa.Schema | None) -> pa.Table:
    """One line per row: the id, then the user's columns.

    Args:
        ids: N strings.
        columns: name -> N values (list, array, tensor or Arrow array); None for no columns.
        schema: That of the rows before; None for the first ones, whose types then hold for the store.

    Raises:
        StoreError: Lengths, names or types do not fit.
    """
    if not isinstance(columns or {}, Mapping) or not _are_names(columns or {}):
        raise StoreError("columns must be a dict, str -> one value for each row")
    columns = dict(columns or {})
    if not all_str(ids):
        raise StoreError("ids must be a list of str, one for each row; convert them with str()")
    if ID in columns:
        raise StoreError(f"a column cannot be named {ID!r}: that is the row id's own name; choose another")
    names = schema.names[1:] if schema is not None else list(columns)
    if sorted(names) != sorted(columns):
        raise StoreError(
            f"the columns are {sorted(columns)} and those of the first rows {sorted(names)};"
            " every append must give the same"
        )
    arrays = [_array(ID, ids, pa.string(), len(ids))]
    for name in names:
        arrays.append(_array(name, columns[name], schema.field(name).type if schema is not None else None, len(ids)))
    table = pa.table(arrays, names=[ID, *names])
    return table if schema is not None else _as_read_back(table)


def _as_read_back(table: pa.Table) -> pa.Table:
    """The types that Parquet gives back (it renames the items of lists, widens timestamps): rows that come from a short
    shard and rows that come from the caller must make the same file."""
    if table.num_columns == 1:
        return table  # ids come back as they are
    try:
        kept = table.cast(from_parquet(to_parquet(table.schema.empty_table())).schema)
    except pa.ArrowException as error:
        raise StoreError(f"the columns cannot be stored as Parquet: {' '.join(str(error).split())}") from None
    for before, after in zip(table.schema, kept.schema, strict=True):
        if _family(before.type) != _family(after.type):
            raise StoreError(f"column {before.name!r} is {before.type}, which Parquet does not have; convert it")
    return kept


def _are_names(columns: Iterable[Any]) -> bool:
    try:
        "".join(columns).encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def _family(kind: pa.DataType) -> str:
    """What a cast must not leave: it would make 5 True, "7" the number 7, and 12 a date."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    for name, members in _FAMILIES.items():
        if any(member(kind) for member in members):
            return name
    return "nested"


def _array(name: str, values: Any, kind: pa.DataType | None, count: int) -> pa.Array:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, str | bytes | Set | Mapping) or not hasattr(values, "__len__"):
        raise StoreError(f"column {name!r} is a {type(values).__name__}; it must be a list with one value for each row")
    if len(values) != count:
        raise StoreError(f"column {name!r} has {len(values)} values for {count} rows; give one for each row")
    try:
        # A type given at once saves most of the time, but would cut 2.5 to the integer 2, which a cast refuses.
        given = kind if kind == pa.string() else None
        if not isinstance(values, pa.Array):
            values = strings(values) if name == ID else pa.array(values, given)
        array = values
        if kind is not None and array.type != kind:
            if not pa.types.is_null(array.type) and _family(array.type) != _family(kind):
                raise TypeError(f"they are {array.type}")
            array = array.cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError) as error:
        wanted = f" as {kind}, the type of the first rows" if kind is not None else ""
        raise StoreError(f"column {name!r} cannot be stored{wanted}: {' '.join(str(error).split())}") from None
    if pa.types.is_null(array.type):
        raise StoreError(f"column {name!r} holds only None in the first rows; pass it as a pyarrow array with a type")
    return array


def to_parquet(table: pa.Table) -> bytes:
    """Parquet bytes; equal tables give equal bytes, however they were put together.

    The footer's metadata carries a checksum of the file, so that it can be verified by itself.
    """
    sink = pa.BufferOutputStream()
    table = table.combine_chunks().replace_schema_metadata(None)
    repeats = table.num_columns > 1  # ids do not: a dictionary of them is made in vain
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False, use_dictionary=repeats) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata({_CHECKSUM: ZEROS.decode()})
    data = sink.getvalue().to_pybytes()
    return seal(data, data.rindex(ZEROS))[0]


def is_intact(data: bytes) -> bool:
    """Whether it is a file from `to_parquet` of which no byte has changed."""
    try:
        recorded = (pq.read_metadata(pa.BufferReader(data)).metadata or {})[_CHECKSUM.encode()]
        return len(set(sealed_checksum(memoryview(data), data.rindex(recorded)))) == 1
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return False


def from_parquet(data: bytes, names: list[str] | None = None) -> pa.Table:
    """All columns, or some."""
    return pq.ParquetFile(pa.BufferReader(data)).read(names, use_threads=False).replace_schema_metadata(None)
