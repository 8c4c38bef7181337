"""What is planned is what happens: bytes on disk, peak memory under a limit, layers and steps of a probe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.store.reading import ahead
from logra_kernels.store.writing import writer

HERE = Path(__file__).parent
DIM, ROWS, SHARD = 8192, 14400, 256  # 472 MB in shards of 8 MB
HEADROOM = 150 << 20  # a third of the store


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A store and the fp64 scores of its rows for the queries of limited.py."""
    path = tmp_path_factory.mktemp("big") / "s"
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1)).double()
    scores = []
    with lk.GradientStore.create(path, {"a": (64, 128)}, rows_per_shard=SHARD) as store:
        for start in range(0, ROWS, SHARD):
            rows = torch.randn(min(SHARD, ROWS - start), DIM, generator=generator)
            store.append(rows, [str(row) for row in range(start, start + len(rows))])
            scores.append(queries @ rows.double().T)
    return path, torch.cat(scores, dim=1)


@pytest.fixture
def idle(monkeypatch):
    """The process takes no memory: what other tests have left of it comes and goes."""
    monkeypatch.setattr(sys.modules["logra_kernels.plan"], "process_bytes", lambda _: 0)


def test_a_store_three_times_the_memory_it_is_asked_in(big):
    path, exact = big
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, HERE / "store" / "limited.py", path, str(HEADROOM)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["store"] >= 3 * HEADROOM
    best = exact.topk(20)
    assert seen["index"] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor(seen["values"]).double(), best.values, rtol=1e-5, atol=1e-3)
    assert seen["planned"] / 1.1 <= seen["peak"] <= 1.1 * seen["planned"]


def test_bytes_of_a_store(big):
    path, _ = big
    planned = lk.plan(path)
    assert (planned.rows, planned.dim, list(planned.formats)) == (ROWS, DIM, ["fp32"])
    on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert 0 <= on_disk - planned.formats["fp32"].disk_bytes < 512 * (ROWS // SHARD + 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8", "int8", "int4", "sign"])
def test_bytes_of_a_store_to_be_made(tmp_path, dtype):
    layers = {"a": (8, 8), "b": (3, 5)}
    cost = lk.plan(layers, rows=10).formats[dtype]
    with lk.GradientStore.create(tmp_path / "s", layers, dtype) as store:
        store.append(torch.randn(10, 79), [str(row) for row in range(10)])
        assert cost.row_bytes == store.manifest.row_bytes
    (file,) = (tmp_path / "s").glob("*.safetensors")
    assert 0 < file.stat().st_size - cost.disk_bytes < 512


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_rows_that_are_kept_as_factors(tmp_path, dtype, idle):
    layers = {"a": (8, 8), "b": (7, 5)}
    planned = lk.plan(layers, rows=10, rank_c=2)
    assert planned.rank_c == 2
    with lk.GradientStore.create(tmp_path / "s", layers, dtype, rank_c=2) as store:
        store.append(torch.randn(10, 99), [str(row) for row in range(10)])
        assert planned.formats[dtype].row_bytes == store.manifest.row_bytes
    assert lk.plan(tmp_path / "s").rank_c == 2
    assert planned.formats[dtype].topk_bytes < lk.plan(layers, rows=10).formats[dtype].topk_bytes + (1 << 20)
    with pytest.raises(ValueError, match="rank_c 1 for a store that has 2"):
        lk.plan(tmp_path / "s", rank_c=1)
    with pytest.raises(lk.StoreError, match="use fewer factors"):
        lk.plan(layers, rows=10, rank_c=4)


def test_memory_of_factored_rows_at_work(idle):
    """Of 32,768 rows at a time, 16 MB of fp32: their 128 numbers, and for 64 queries the scores, scaled, and keys."""
    costs = [lk.plan({"a": (64, 64)}, rows=count, queries=64, rank_c=1).formats["sign"] for count in (1, 10**6)]
    work = costs[1].topk_bytes - costs[0].topk_bytes - costs[1].disk_bytes
    assert work == pytest.approx(4 * 32768 * (128 + 3 * 64), rel=0.05)


def test_a_store_that_outgrows_memory_is_planned_with_a_window(monkeypatch, idle):
    layers, sizes = {"a": (64, 64)}, {}
    for limit in (1 << 50, 1 << 20):
        monkeypatch.setattr(ahead, "outgrows_memory", lambda nbytes, limit=limit: nbytes > limit)
        sizes[limit] = lk.plan(layers, rows=1_000_000).formats["fp32"].topk_bytes
    assert sizes[1 << 50] - sizes[1 << 20] > 10e9
    assert 0 < sizes[1 << 20] < 1e9


def test_more_queries_take_more_memory(idle):
    few, many = (lk.plan({"a": (256, 256)}, rows=10, queries=count).formats["fp32"].topk_bytes for count in (1, 1000))
    assert many - few > 2 * 4 * 990 * 65536


def test_a_probe_logs_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x, steps = torch.randn(7, 6), []

    def step():
        steps.append(1)
        model(x).square().sum().backward()

    found = lk.probe(model, step, 7, projection=lk.Projection(rank=3), include=["2"])
    assert found.layers == {"2": (3, 3)}
    assert len(steps) == 4
    assert found.seconds(15) == 3 * found.step_seconds > 0
    assert found.peak_bytes > writer.writing_bytes(0)
    assert found.device_bytes is None
    assert found.observing is None
    assert found.observe_seconds(100) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_probe_of_a_projection_that_is_learned_observes_before_it_logs(monkeypatch):
    model, x, inside = nn.Linear(600, 500), torch.randn(7, 600), []
    for name in ("observe", "log"):
        method = getattr(lk.Run, name)
        monkeypatch.setattr(
            lk.Run, name, lambda self, *args, _m=method, _n=name, **kw: (inside.append(_n), _m(self, *args, **kw))[1]
        )
    found = lk.probe(model, lambda: model(x).square().sum().backward(), 7, projection=lk.Projection(3, "pca"))
    assert inside == ["observe"] * 3 + ["log"] * 4
    assert found.layers == {"": (3, 3)}
    cost = found.observing
    assert min(cost.first_seconds, cost.step_seconds, cost.solve_seconds) > 0
    assert found.observe_seconds(15) == cost.first_seconds + 2 * cost.step_seconds + cost.solve_seconds
    assert found.observe_seconds(0) == 0


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="how many rows"):
        lk.plan({"a": (2, 2)})
    with pytest.raises(ValueError, match="queries 0"):
        lk.plan({"a": (2, 2)}, rows=5, queries=0)
    with pytest.raises(ValueError, match="samples is 0"):
        lk.probe(nn.Linear(2, 2), lambda: None, 0)
    with pytest.raises(lk.StoreError, match="not a gradient store"):
        lk.plan("/nowhere")
