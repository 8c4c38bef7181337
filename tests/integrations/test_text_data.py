"""Rows from every supported file kind, and one-line errors that name the place for everything malformed."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logra_kernels.errors import LograError
from logra_kernels.integrations.text_data import TextRow, read_rows


def _jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _error(*args, **kwargs):
    with pytest.raises(LograError) as caught:
        read_rows(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_keeps_order_and_fills_missing_ids_and_sources(tmp_path):
    file = _jsonl(
        tmp_path / "data.jsonl",
        {"id": 7, "text": "one", "source": "book"},
        {"text": "zwei äöü", "extra": [1]},
    )
    assert read_rows(file) == [TextRow("7", "one", "book"), TextRow("data:2", "zwei äöü", "data")]


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert [(row.id, row.text) for row in read_rows(file)] == [("data:1", "one"), ("data:2", "two")]


def test_own_field_names(tmp_path):
    file = _jsonl(tmp_path / "data.jsonl", {"key": "a", "body": "one", "provider": "p"})
    assert read_rows(file, "body", "key", "provider") == [TextRow("a", "one", "p")]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet(tmp_path, suffix):
    plain = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "id": [10, 11], "other": [0.5, 0.5]}), plain)
    file = tmp_path / f"data.parquet{suffix}"
    if suffix:
        file.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(file) == [TextRow("10", "one", "data"), TextRow("11", "two", "data")]


@pytest.mark.parametrize(
    "text",
    [
        "one\nstill one\n\n \n\ntwo\n",
        "one\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>",
        "one\r\nstill one\r\n\r\ntwo",
    ],
)
def test_plain_text_documents(tmp_path, text):
    file = tmp_path / "book.txt.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert read_rows(file) == [TextRow("book:1", "one\nstill one", "book"), TextRow("book:2", "two", "book")]


def test_blank_lines_do_not_split_marked_text(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("one\n\nstill one\n<|endoftext|>\ntwo")
    assert [row.text for row in read_rows(file)] == ["one\n\nstill one", "two"]


def test_plain_text_has_names_of_its_own_beside_jsonl_with_chosen_fields(tmp_path):
    (tmp_path / "book.txt").write_text("one")
    file = _jsonl(tmp_path / "data.jsonl", {"key": "a", "text": "two", "source": "s"})
    rows = read_rows([tmp_path / "book.txt", file], id_field="key")
    assert rows == [TextRow("book:1", "one", "book"), TextRow("a", "two", "s")]


def test_limit_counts_rows_over_all_files(tmp_path):
    first = _jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    second = tmp_path / "b.jsonl"
    second.write_text('{"text": "three"}\nnot JSON, never reached')
    assert [row.id for row in read_rows([first, second], limit=3)] == ["a:1", "a:2", "b:1"]


def test_missing_text_field_lists_the_fields_found(tmp_path):
    message = _error(_jsonl(tmp_path / "data.jsonl", {"text": "one"}, {"body": "two", "title": "x"}))
    assert "data.jsonl line 2" in message
    assert "'text' is missing" in message
    assert "body, title" in message
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "data.parquet")
    assert "fields found: body" in _error(tmp_path / "data.parquet")


@pytest.mark.parametrize("field", [{"id_field": "key"}, {"source_field": "provider"}])
def test_a_field_that_was_asked_for_must_be_there(tmp_path, field):
    message = _error(_jsonl(tmp_path / "data.jsonl", {"text": "one"}), **field)
    assert f"field {next(iter(field.values()))!r} is missing" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "one"', "line 2: not JSON"),
        (b'["one"]', "line 2: a list instead of an object"),
        (b'{"text": 5}', "line 2: field 'text' is a number"),
        (b'{"text": null}', "line 2: field 'text' is null"),
        (b'{"text": "  "}', "line 2: field 'text' is empty"),
        (b'{"text": "a", "id": 0.5}', "line 2: field 'id' is a fraction"),
        (b'{"text": "a", "source": ["s"]}', "line 2: field 'source' is a list"),
        (b'{"text": "\xff"}', "line 2: byte 11 is not UTF-8"),
        (rb'{"text": "abc \ud83d def"}', r"line 2: field 'text' holds half of a surrogate pair (\ud83d, character 5)"),
        (rb'{"text": "a", "id": "\ude00"}', r"line 2: field 'id' holds half of a surrogate pair (\ude00, character 1)"),
        (rb'{"text": "a", "source": "b\ud83d"}', "line 2: field 'source' holds half of a surrogate pair"),
        (b'{"text": "a", "id": "data:1"}', "row id 'data:1' appears twice"),
    ],
)
def test_malformed_rows(tmp_path, line, expected):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    message = _error(file)
    assert expected in message
    assert "data.jsonl" in message


def test_whole_surrogate_pairs_are_text(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(r'{"text": "abc \ud83d\ude00", "id": "\ud83d\ude00"}')
    assert read_rows(file) == [TextRow("\U0001f600", "abc \U0001f600", "data")]


def test_unreadable_files(tmp_path):
    assert "does not exist" in _error(tmp_path / "absent.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "is not a file" in _error(tmp_path / "folder.jsonl")
    (tmp_path / "data.csv").write_text("text\none")
    assert "cannot tell the format" in _error(tmp_path / "data.csv")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 but no more")
    assert "not a readable Parquet file" in _error(tmp_path / "data.parquet")
    (tmp_path / "data.txt").write_bytes(b"abc\xff")
    assert "byte 4 is not UTF-8" in _error(tmp_path / "data.txt")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:-9])
    assert "not a whole gzip file" in _error(tmp_path / "data.jsonl.gz", id_field="id")
    (tmp_path / "cut.jsonl.gz").write_bytes(b"no gzip")
    assert "not a whole gzip file" in _error(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("content", ["", "\n\n", "<|endoftext|>"])
def test_empty_data(tmp_path, content):
    file = tmp_path / "data.txt"
    file.write_text(content)
    assert "holds no rows" in _error(file)
    assert "no file given" in _error([])
