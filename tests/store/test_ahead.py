"""Shards brought in ahead of their use: the same answers, nothing before its checksum, memory given back."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
from store.samples import DIM, rows_of, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, shard
from logra_kernels.store.reading import ahead, memory
from logra_kernels.store.shard import MappedShard

COUNT = 39


@pytest.fixture(params=["kept", "given back"])
def store(tmp_path, monkeypatch, request):
    if request.param == "given back":
        monkeypatch.setattr(memory, "memory_limit", lambda: 100)
    return GradientStore.open(write(tmp_path / "s", COUNT))


@pytest.mark.parametrize("window", [0, 1500, 1 << 30])
def test_every_way_gives_the_same(store, monkeypatch, window):
    monkeypatch.setattr(ahead, "AHEAD_BYTES", window)
    queries = rows_of(3, seed=1)
    exact = queries.double() @ rows_of(COUNT).double().T
    for _ in range(2):
        torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(store.topk(queries, 5)[1], exact.topk(5).indices)
        assert torch.equal(torch.cat([rows for _, rows in store.blocks()]), rows_of(COUNT))


def test_short_shards_are_few_at_a_time(tmp_path):
    """A process may have so many files open, usually 1,024."""
    store = GradientStore.open(write(tmp_path / "s", 600, rows_per_shard=1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 256, limits[1]))
    try:
        found = sum(int((rows == rows_of(600)[first]).all()) for first, rows in store.blocks())
        scores = store.score(rows_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == 600
    torch.testing.assert_close(scores, rows_of(2) @ rows_of(600).T)


def test_memory_is_given_back_where_the_store_outgrows_it(store, monkeypatch):
    gone = []
    real = MappedShard.let_go
    monkeypatch.setattr(MappedShard, "let_go", lambda self: gone.append(self) or real(self))
    outgrown = memory.outgrows_memory(1000)
    store.score(rows_of(2))
    assert len(gone) == (5 if outgrown else 0)
    assert len(store._reader._mapped) == (0 if outgrown else 4)  # the short last one is mapped by itself


def test_a_damaged_shard_stops_the_pass_before_it(store):
    path = sorted(store.path.glob("rows-*.safetensors"))[2]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    seen = []
    with pytest.raises(StoreError, match=f"{path.name} is damaged"):
        seen.extend(first for first, _ in store.encoded_blocks())
    assert seen == [0, 8]
    with pytest.raises(StoreError, match=f"{path.name} is damaged"):
        store.topk(rows_of(2), 3)


def test_a_file_that_is_cut_while_it_is_mapped(store):
    store.score(rows_of(1))
    path = sorted(store.path.glob("rows-*.safetensors"))[1]
    os.truncate(path, 0)
    with pytest.raises(StoreError, match=f"{path.name} (cannot be read|is damaged)"):
        store.score(rows_of(1))


def test_a_pass_that_is_broken_off_leaves_no_threads(store):
    before = threading.active_count()
    blocks = store.encoded_blocks(max_bytes=DIM * 4)
    assert next(blocks)[0] == 0
    blocks.close()
    assert threading.active_count() == before


def test_what_a_caller_writes_on_a_block_stays(store):
    blocks = []
    for _, rows in store.blocks():
        rows.zero_()
        blocks.append(rows)
    assert not torch.cat(blocks).any()
    assert torch.equal(store.read(0, COUNT), rows_of(COUNT))


LIMITED = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (8 << 30, resource.RLIM_INFINITY))
from logra_kernels.store.reading.memory import memory_limit
print(memory_limit())
"""


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_resource_limit_counts(kind):
    shown = subprocess.run([sys.executable, "-c", LIMITED, kind], capture_output=True, text=True, check=True).stdout
    assert int(shown) <= 8 << 30


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_counts(tmp_path, monkeypatch, version):
    lines = {1: "5:cpu:/other\n4:cpuset,memory:/a/b\n", 2: "0::/a/b\n"}[version]
    root, name = {1: (tmp_path / "memory", "memory.limit_in_bytes"), 2: (tmp_path, "memory.max")}[version]
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / name).write_text("12345678\n")
    (root / "a" / "b" / name).write_text("max\n")
    (tmp_path / "self").write_text(lines)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "self")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory.memory_limit() == 12345678


def test_shards_at_hand_need_no_thread(tmp_path, monkeypatch):
    store = GradientStore.open(write(tmp_path / "s", COUNT))
    queries, started = rows_of(3, seed=1), []
    first = store.topk(queries, 5)
    real = ahead.Lane
    monkeypatch.setattr(ahead, "Lane", lambda name: started.append(name) or real(name))
    assert all(map(torch.equal, store.topk(queries, 5), first))
    assert started == []
    monkeypatch.setattr(shard, "resident", lambda _: False)  # as if other programs had taken the memory
    assert all(map(torch.equal, store.topk(queries, 5), first))
    assert started == []  # it is not asked for each query
    monkeypatch.setattr(shard, "ASKED_EVERY", -1.0)
    assert all(map(torch.equal, store.topk(queries, 5), first))
    assert started == ["logra-store-read", "logra-store-hash"]
