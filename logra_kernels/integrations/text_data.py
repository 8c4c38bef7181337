"""Rows of text from JSONL, Parquet and plain text files, each of them optionally gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from logra_kernels.errors import LograError
from logra_kernels.integrations.surrogates import refuse_half_pairs

END_OF_TEXT = "<|endoftext|>"
TEXT_FIELD, ID_FIELD, SOURCE_FIELD = "text", "id", "source"


@dataclass(frozen=True)
class TextRow:
    """One document: its id (unique in the data), its text, and its source (the provider it came from)."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class _Fields:
    text: str
    id: str
    source: str


def read_rows(
    paths: str | Path | Iterable[str | Path],
    text_field: str = TEXT_FIELD,
    id_field: str = ID_FIELD,
    source_field: str = SOURCE_FIELD,
    limit: int | None = None,
) -> list[TextRow]:
    """Read documents in the order of the files and of the rows in them.

    `.jsonl`, `.ndjson` and `.json` hold one object a line, `.parquet` one document a row, `.txt` documents between
    `<|endoftext|>` marks, or between blank lines where there is no such mark. `.gz` may follow any of these.

    Args:
        paths: One file or several.
        text_field: Field of the text in JSONL and Parquet.
        id_field: Field of the id; where a row has none it is "<file stem>:<row number>".
        source_field: Field of the provider; where a row has none it is the file's stem.
        limit: Read no more rows than this.

    Raises:
        LograError: A file cannot be read, a row is malformed, has an empty text or half of a surrogate pair, a field is
            missing (the default id and source fields may be), two rows share an id, or there is no row at all.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    fields = _Fields(text_field, id_field, source_field)
    rows: list[TextRow] = []
    places: dict[str, str] = {}
    for place, row in islice(_rows(files, fields), limit):
        if row.id in places:
            raise LograError(
                f"row id {row.id!r} appears twice ({places[row.id]} and {place}); "
                "ids must be unique, choose another id field or rename a file"
            )
        places[row.id] = place
        rows.append(row)
    if not rows:
        names = ", ".join(str(file) for file in files) or "no file given"
        raise LograError(f"the data holds no rows ({names}); give at least one document")
    return rows


def _rows(files: list[Path], fields: _Fields) -> Iterator[tuple[str, TextRow]]:
    for file in files:
        stem = _stem(file)
        for number, (place, record) in enumerate(_records(file, fields), start=1):
            text = _value(record, fields.text, place, default=None)
            if not isinstance(text, str):
                raise LograError(f"{place}: field {fields.text!r} is {_kind(text)}, not a string")
            if not text.strip():
                raise LograError(f"{place}: field {fields.text!r} is empty; drop the row")
            name = _value(record, fields.id, place, default=f"{stem}:{number}" if fields.id == ID_FIELD else None)
            source = _value(record, fields.source, place, default=stem if fields.source == SOURCE_FIELD else None)
            row = TextRow(_label(name, fields.id, place), text, _label(source, fields.source, place))
            for field, value in ((fields.text, row.text), (fields.id, row.id), (fields.source, row.source)):
                refuse_half_pairs(value, f"{place}: field {field!r}")
            yield place, row


def _value(record: dict[str, Any], field: str, place: str, default: str | None) -> Any:
    value = record.get(field)
    if value is not None:
        return value
    if default is not None:
        return default
    state = "null" if field in record else "missing"
    found = ", ".join(sorted(record)) or "none"
    raise LograError(f"{place}: field {field!r} is {state}; fields found: {found}")


def _label(value: Any, field: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise LograError(f"{place}: field {field!r} is {_kind(value)}, not a string or a whole number")
    return str(value)


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a fraction"}
    return names.get(type(value), f"a {type(value).__name__}")


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix == ".gz" else file.stem


def _records(file: Path, fields: _Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents of one file: (where each is, for messages; its fields)."""
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    reader = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _jsonl, ".parquet": _parquet, ".txt": _plain}.get(suffix)
    if reader is None:
        raise LograError(f"cannot tell the format of {file}; use .jsonl, .parquet or .txt, with or without .gz")
    if not file.is_file():
        raise LograError(f"data file {file} {'is not a file' if file.exists() else 'does not exist'}")
    try:
        with _open(file) as stream:
            yield from reader(stream, file, fields)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LograError(f"{file} is not a whole gzip file ({error})") from error
    except OSError as error:
        raise LograError(f"cannot read {file}: {error.strerror or error}") from error


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _jsonl(stream: IO[bytes], file: Path, fields: _Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        place = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise LograError(f"{place}: byte {error.start + 1} is not UTF-8; convert the file") from error
        except json.JSONDecodeError as error:
            raise LograError(f"{place}: not JSON ({error.msg} at column {error.colno}); one object a line") from error
        if not isinstance(record, dict):
            raise LograError(f"{place}: {_kind(record)} instead of an object; one object a line")
        yield place, record


def _parquet(stream: IO[bytes], file: Path, fields: _Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream)
        found = table.schema_arrow.names
        if fields.text not in found:
            raise LograError(f"{file}: field {fields.text!r} is missing; fields found: {', '.join(sorted(found))}")
        wanted = [name for name in (fields.text, fields.id, fields.source) if name in found]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise LograError(f"{file} is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _plain(stream: IO[bytes], file: Path, fields: _Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LograError(f"{file}: byte {error.start + 1} is not UTF-8; convert the file") from error
    text = text.replace("\r\n", "\n")
    parts = text.split(END_OF_TEXT) if END_OF_TEXT in text else _paragraphs(text)
    documents = (part.strip() for part in parts)
    for number, document in enumerate((document for document in documents if document), start=1):
        names = {fields.id: f"{_stem(file)}:{number}", fields.source: _stem(file)}
        yield f"{file} document {number}", names | {fields.text: document}


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
