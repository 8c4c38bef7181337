"""merge, delete, compact and fsck from the command line."""

import json
import shutil

import pytest
import torch
from cli.conftest import call, contents
from store.samples import LAYERS, part_of, write

from logra_kernels.store import GradientStore


@pytest.fixture
def store(memory_dir):
    return write(memory_dir / "store", 20)


def printed(capsys, *argv, code=0):
    capsys.readouterr()
    assert call(*argv) == code
    return capsys.readouterr().out


def test_delete_by_id_file_and_column(store, memory_dir, capsys):
    listed = memory_dir / "ids.txt"
    listed.write_text("row-1\nrow-2\n")
    out = printed(capsys, "delete", store, "--ids", "row-0", "row-1", "--ids-file", listed)
    assert "deleted   3 rows" in out
    assert "17 are left" in out
    assert f"logra compact {store}" in out
    assert "deleted   0 rows" in printed(capsys, "delete", store, "--ids", "row-0")
    printed(capsys, "delete", store, "--where", "source=book 0", "--where", "weight=4.0")
    assert GradientStore.open(store).ids == [f"row-{i}" for i in range(3, 20) if i != 12]
    assert "1 rows" in printed(capsys, "delete", store, "--ids", "nobody", "row-3", "--missing-ok")


def test_ids_with_other_ends_of_lines(memory_dir, capsys):
    names = ["a\u2028b", "a", "b", "c\rd", "c", "d", "e\x0cf", "e", "last"]
    with GradientStore.create(memory_dir / "odd", {"x": (2, 2)}) as store:
        store.append(torch.ones(len(names), 4), names)
    listed = memory_dir / "ids.txt"
    listed.write_bytes("\r\n".join([names[0], names[3], "", names[6]]).encode("utf-8-sig"))
    printed(capsys, "delete", memory_dir / "odd", "--ids-file", listed)
    assert GradientStore.open(memory_dir / "odd").ids == ["a", "b", "c", "d", "e", "last"]


def test_what_delete_refuses(store, fails, memory_dir):
    message = fails("delete", store, "--ids", "row-0", "nobody")
    assert "none was deleted" in message
    assert "missing_ok=True (`logra delete --missing-ok`)" in message
    assert "say which rows" in fails("delete", store)
    assert "must be COLUMN=VALUE" in fails("delete", store, "--where", "source")
    assert "has no column 'author'" in fails("delete", store, "--where", "author=x")
    assert "no row of" in fails("delete", store, "--where", "source=x")
    assert "No such file" in fails("delete", store, "--ids-file", memory_dir / "none")
    assert "is not a gradient store" in fails("delete", memory_dir / "none", "--ids", "x")
    assert len(GradientStore.open(store)) == 20


def test_info_says_what_is_deleted_and_how_well_the_index_finds(store, capsys):
    printed(capsys, "delete", store, "--ids", "row-5", "row-6")
    assert "rows            18, and 2 deleted ones" in printed(capsys, "info", store)
    GradientStore.open(store).build_index(22, k=3)
    printed(capsys, "compact", store)
    out = printed(capsys, "info", store)
    assert "rows            18\n" in out
    assert "search index    22 numbers a row, bf16; of the 3 best rows of 18 queries (k is 3 of 18 rows)" in out


def test_index(store, capsys, fails):
    out = printed(capsys, "index", store, "--dims", "22", "--k", "3")
    assert "22 numbers for each of 20 rows, bf16" in out
    assert out.count("<- used") == 1
    assert "of the 3 best rows (k is 3 of 20 rows) of 20 stored rows" in out
    assert GradientStore.open(store).index.k == 3
    out = printed(capsys, "index", store, "--dims", "2")
    assert "of the 2 best rows (k is 2 of 20 rows, a tenth but at most 100) of 20 stored rows" in out
    assert GradientStore.open(store).index.k == 2
    assert "(k is 2 of 20 rows, a tenth but at most 100)" in printed(capsys, "info", store)
    assert "dims is 23" in fails("index", store, "--dims", "23")


def test_a_query_by_the_index(whole, model_dir, memory_dir, capsys, fails):
    copy = shutil.copytree(whole, memory_dir / "copy")
    ask = ["query", copy, "--model", model_dir, "--text", "some words", "--mode", "dot", "--json"]
    assert "was not built" in fails(*ask, "--search", "index")
    printed(capsys, "index", copy, "--k", "20")
    exact = json.loads(printed(capsys, *ask, "-k", "160"))["queries"][0]["rows"]
    found = json.loads(printed(capsys, *ask, "-k", "3", "--search", "index"))["queries"][0]["rows"]
    scores = {row["id"]: row["score"] for row in exact}
    assert len(found) == 3
    assert all(row["score"] == pytest.approx(scores[row["id"]], rel=1e-4) for row in found)


def test_compact(store, capsys, fails):
    printed(capsys, "delete", store, "--ids", "row-5")
    reader = GradientStore.open(store)
    out = printed(capsys, "compact", store)
    assert "1 deleted rows taken out" in out
    assert "somebody is reading" in out
    assert len(reader.ids) == 19
    del reader
    assert "reading" not in printed(capsys, "compact", store)
    assert "is not a gradient store" in fails("compact", store / "none")


def test_merge(store, memory_dir, capsys, fails):
    other = memory_dir / "other"
    with GradientStore.create(other, LAYERS, rows_per_shard=8) as made:
        made.append(*part_of(30, 15, 30))
    message = fails("merge", store, other, "--out", memory_dir / "out")
    assert "5 ids are in more than one" in message
    assert "duplicates='keep' (`logra merge --duplicates keep`)" in message
    out = printed(capsys, "merge", store, other, "--out", memory_dir / "out", "--duplicates", "keep", "--copy")
    assert "35 rows" in out
    assert GradientStore.open(memory_dir / "out").ids[20] == "row-15#2"


def test_a_merge_does_not_go_into_an_input_or_another_store(store, memory_dir, capsys, fails):
    other = memory_dir / "other"
    with GradientStore.create(other, LAYERS, rows_per_shard=8) as made:
        made.append(*part_of(30, 20, 30))
    before = contents(memory_dir)
    (memory_dir / "link").symlink_to(store)
    for out in (store, other, memory_dir / "link", f"{memory_dir}/none/../store"):
        message = fails("merge", store, other, "--out", out)
        assert "the output must be a new path, not an input's" in message
    message = fails("merge", store, "--out", other)
    assert "holds a gradient store already; the output must be a new path" in message
    assert "remove" not in message
    (memory_dir / "link").unlink()
    assert contents(memory_dir) == before
    for _ in range(2):  # the same merge again has nothing to do
        assert "30 rows" in printed(capsys, "merge", store, other, "--out", memory_dir / "out")
    assert "holds a merge of other rows" in fails("merge", store, "--out", memory_dir / "out")


def test_fsck(store, capsys, fails):
    assert "20 rows intact, whole" in printed(capsys, "fsck", store)
    file = store / "rows-000000000008-000000000016.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    out = printed(capsys, "fsck", store, code=1)
    assert f"fault   {file} is damaged: its checksum does not fit its content\n" in out
    assert "lost    8 rows: row-8, row-9" in out
    assert "12 rows intact, 1 fault left" in out
    assert "fsck --repair" in fails("info", store, "--verify")
    assert "whole" in printed(capsys, "fsck", store, "--repair")
    assert "12 rows intact, whole" in printed(capsys, "fsck", store)
    assert "add --repair" in fails("fsck", store, "--undelete")
    assert "is not a directory" in fails("fsck", store / "none")
