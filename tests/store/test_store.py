import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from store.samples import DIM, LAYERS, columns_of, ids_of, part_of, rows_of, tree, write

from logra_kernels.errors import LograError, StoreError, StoreMismatch
from logra_kernels.store import GradientStore


def stored(rows, dtype):
    return rows.bfloat16().float() if dtype == "bf16" else rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows_per_shard", [1, 7, 20, 64, None])
def test_what_was_appended_is_read_back(tmp_path, dtype, rows_per_shard):
    write(tmp_path / "s", 20, dtype, rows_per_shard)
    store = GradientStore.open(tmp_path / "s")
    assert (len(store), store.dim, store.dtype) == (20, DIM, dtype)
    assert store.ids == ids_of(20)
    assert store.columns == columns_of(20)
    for start, stop in [(0, 20), (3, 19), (6, 8), (5, 5), (19, 20)]:
        assert torch.equal(store.read(start, stop), stored(rows_of(20)[start:stop], dtype))


def test_it_describes_itself(tmp_path):
    projection = {"kind": "orthonormal", "rank": 4, "shape": (2, 3)}
    with GradientStore.create(
        tmp_path / "s", LAYERS, projection=projection, fingerprints={"model": "ab"}, meta={"loss": "sum"}
    ) as store:
        store.append(rows_of(3), ids_of(3))
    again = GradientStore.open(tmp_path / "s")
    for held in (store, again):
        assert list(held.layers.items()) == list(LAYERS.items())
        assert held.slices == {"first": slice(0, 6), "h.0.mlp": slice(6, 22)}
        assert held.projection == {"kind": "orthonormal", "rank": 4, "shape": [2, 3]}
        assert (held.fingerprints, held.meta, held.columns) == ({"model": "ab"}, {"loss": "sum"}, {})
    files = tree(tmp_path / "s")
    assert again.nbytes == sum(len(data) for name, data in files.items() if name.startswith("rows-"))
    assert GradientStore.exists(tmp_path / "s")
    assert not GradientStore.exists(tmp_path / "t")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_tools_read_it(tmp_path, dtype):
    write(tmp_path / "s", 11, dtype, 8)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [shard["stop"] for shard in manifest["shards"]] == [8, 11]
    rows = [load_file(tmp_path / "s" / shard["rows"]["file"])["rows"] for shard in manifest["shards"]]
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(torch.cat(rows), rows_of(11).to(torch_dtype))
    tables = pa.concat_tables(pq.read_table(tmp_path / "s" / s["columns"]["file"]) for s in manifest["shards"])
    assert tables.to_pydict() == {"id": ids_of(11), **columns_of(11)}
    with safe_open(tmp_path / "s" / manifest["shards"][0]["rows"]["file"], "pt") as file:
        assert file.metadata() == {"checksum": manifest["shards"][0]["rows"]["checksum"]}
    assert (tmp_path / "s" / "lock").read_bytes() == b""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_strides(tmp_path, dtype):
    rows = rows_of(9).to(dtype)
    wide = torch.zeros(9, 2 * DIM, dtype=dtype)
    wide[:, ::2] = rows
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=4) as store:
        store.append(wide[:, ::2].requires_grad_(), ids_of(9))
    assert torch.equal(GradientStore.open(tmp_path / "s").read(0, 9), rows.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_and_queries_on_a_gpu(tmp_path):
    rows, queries = rows_of(20).cuda(), rows_of(3, seed=1).cuda()
    with GradientStore.create(tmp_path / "s", LAYERS, "bf16", rows_per_shard=8) as store:
        store.append(rows, ids_of(20))
    store = GradientStore.open(tmp_path / "s")
    assert torch.equal(store.read(0, 20), rows.bfloat16().float().cpu())
    values, index = store.topk(queries, 5, row_scale=torch.ones(20))
    dense = queries @ rows.bfloat16().float().T
    torch.testing.assert_close(store.score(queries), dense)
    torch.testing.assert_close(values, dense.topk(5).values)
    assert index.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_rows_leave_a_gpu_while_it_computes(tmp_path, dtype):
    rows = torch.randn(64, 4096)
    for name, device in (("there", "cuda"), ("here", "cpu")):
        with GradientStore.create(tmp_path / name, {"a": (64, 64)}, dtype, rows_per_shard=10) as store:
            buffer = torch.empty(8, 4096, device=device)
            for start in range(0, 64, 8):
                buffer.copy_(rows[start : start + 8])
                store.append(buffer, [str(i) for i in range(start, start + 8)])
                buffer.fill_(torch.nan)
    assert torch.equal(*(GradientStore.open(tmp_path / name).read(0, 64) for name in ("there", "here")))
    with GradientStore.open(tmp_path / "there", mode="append") as store:
        store.append(buffer[:2], ["x", "y"])
        with pytest.raises(StoreError, match="2 rows hold NaN"):
            store.flush()
    assert len(GradientStore.open(tmp_path / "there")) == 64


def test_the_callers_buffers_may_be_reused(tmp_path):
    rows, ids = rows_of(6), ids_of(6)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=50) as store:
        store.append(rows, ids)
        rows.fill_(7)
        ids[:] = ["gone"] * 6
    store = GradientStore.open(tmp_path / "s")
    assert torch.equal(store.read(0, 6), rows_of(6))
    assert store.ids == ids_of(6)


def test_a_huge_append_is_queued_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.store.writing.writer.SLICE_BYTES", 3 * DIM * 4)
    write(tmp_path / "a", 20, rows_per_shard=8)
    monkeypatch.undo()
    write(tmp_path / "b", 20, rows_per_shard=8)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_empty_store_and_an_empty_append(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        assert store.append(rows_of(0), []) == 0
        store.flush()
    store = GradientStore.open(tmp_path / "s")
    assert (len(store), store.ids, store.columns, store.nbytes) == (0, [], {}, 0)
    assert store.read(0, 0).shape == (0, DIM)
    assert list(store.blocks()) == []
    assert store.score(rows_of(2)).shape == (2, 0)
    assert [part.shape for part in store.topk(rows_of(2), 3)] == [(2, 0), (2, 0)]


def test_a_writer_shows_what_is_committed(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=4) as store:
        store.append(*part_of(12, 0, 6))
        store.flush()
        assert len(store) == 6
        assert store.committed("row-5")
        assert not store.committed("row-6")
        assert torch.equal(store.read(0, 6), rows_of(12)[:6])
        store.append(*part_of(12, 6, 7))
        store.flush()
        assert store.ids == ids_of(7)
        assert torch.equal(store.read(5, 7), rows_of(12)[5:7])
        hash_before = store.content_hash
        store.append(*part_of(12, 7, 12))
    assert len(store) == 12
    assert store.content_hash == GradientStore.open(tmp_path / "s").content_hash != hash_before


def test_blocks_are_bounded_and_the_callers_own(tmp_path):
    write(tmp_path / "s", 20, "bf16", 8)
    store = GradientStore.open(tmp_path / "s")
    before = tree(tmp_path / "s")
    for max_bytes, longest in [(1, 1), (3 * DIM * 2, 3), (None, 8)]:
        blocks = list(store.blocks(max_bytes=max_bytes))
        assert max(rows.shape[0] for _, rows in blocks) == longest
        assert torch.equal(torch.cat([rows for _, rows in blocks]), rows_of(20).bfloat16())
        assert [first for first, _ in blocks] == [0, *torch.tensor([len(r) for _, r in blocks[:-1]]).cumsum(0).tolist()]
        for _, rows in blocks:
            rows.zero_()
    assert torch.equal(store.read(0, 20), rows_of(20).bfloat16().float())
    assert tree(tmp_path / "s") == before


def test_a_reader_beside_a_writer_sees_whole_states(tmp_path):
    count = 150
    truth = rows_of(count)
    seen, faults = set(), []
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=16) as store:
        done, looked = threading.Event(), threading.Event()

        def look():
            try:
                while not done.is_set():
                    reader = GradientStore.open(tmp_path / "s")
                    length = len(reader)
                    done.wait(0.002)  # the writer goes on and deletes the tail that this reader was shown
                    assert reader.ids == ids_of(length)
                    assert torch.equal(reader.read(0, length), truth[:length])
                    seen.add(length)
                    looked.set()
            except BaseException as error:
                faults.append(error)
                looked.set()

        watcher = threading.Thread(target=look)
        watcher.start()
        for start in range(0, count, 3):
            store.append(*part_of(count, start, start + 3))
            store.flush()
            if start % 15 == 0:  # however busy the machine is, the reader has its turns
                looked.clear()
                assert looked.wait(60)
        done.set()
        watcher.join()
    assert not faults
    assert len(seen) > 5


def test_fingerprints(tmp_path):
    stored_prints = {"model": "ab", "tokenizer": "cd", "loss": "sum"}
    store = GradientStore.create(tmp_path / "s", LAYERS, fingerprints=stored_prints)
    store.check(dict(reversed(stored_prints.items())))
    with pytest.raises(StoreMismatch) as caught:
        store.check({"model": "ab", "tokenizer": "XX", "data": "ef"})
    text = str(caught.value)
    assert "tokenizer: the store has 'cd', yours is 'XX'" in text
    assert "loss: the store has 'sum', yours is missing" in text
    assert "data: the store has none, yours is 'ef'" in text
    assert "model" not in text
    assert "\n" not in text
    assert isinstance(caught.value, StoreError)
    assert isinstance(caught.value, LograError)


def test_two_writers(tmp_path):
    store = GradientStore.create(tmp_path / "s", LAYERS)
    with pytest.raises(StoreError, match="being written by another process"):
        GradientStore.open(tmp_path / "s", mode="append")
    assert len(GradientStore.open(tmp_path / "s")) == 0
    store.append(rows_of(2), ids_of(2))
    store.close()
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        assert len(store) == 2


def test_a_dropped_store_is_committed_and_unlocked(tmp_path):
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=4)
    store.append(rows_of(6), ids_of(6))
    del store
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        assert len(store) == 6


def test_an_interrupted_creation_is_taken_up(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "lock").touch()
    (tmp_path / "s" / ".tmp-manifest.json").write_text('{\n "chec')
    with pytest.raises(StoreError, match="not a gradient store"):
        GradientStore.open(tmp_path / "s", mode="append")
    write(tmp_path / "s", 20)
    write(tmp_path / "t", 20)
    assert tree(tmp_path / "s") == tree(tmp_path / "t")


def test_leftovers_are_removed_by_the_next_writer_only(tmp_path):
    write(tmp_path / "s", 20, rows_per_shard=8)
    before = tree(tmp_path / "s")
    for name in ("rows-000000000016-000000000024.safetensors", "rows-000000000016-000000000024.parquet", ".tmp-x"):
        (tmp_path / "s" / name).write_bytes(b"half")
    (tmp_path / "s" / "notes.txt").write_bytes(b"the user's own")
    GradientStore.open(tmp_path / "s").read(0, 20)
    assert len(tree(tmp_path / "s")) == len(before) + 4
    GradientStore.open(tmp_path / "s", mode="append").close()
    assert tree(tmp_path / "s") == {**before, "notes.txt": b"the user's own"}


def test_ids_of_chosen_rows(tmp_path):
    store = GradientStore.open(write(tmp_path / "s"))
    chosen = torch.tensor([len(store) - 1, 0, 3, 3])
    assert store.ids_of(chosen) == [store.ids[i] for i in chosen.tolist()]
    assert store.ids_of(chosen[:0]) == []
