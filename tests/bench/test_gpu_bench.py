"""What bench_gpu measures on a CUDA device, tried on a CPU at small sizes: all providers right, all rows whole."""

import json
import os
import subprocess
import sys
import time

import bench_gpu
import gpu_clock
import gpu_logging
import gpu_project_grad
import gpu_scoring
import logging_peers
import pytest
import torch

import logra_kernels as lk


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu_clock, "BATCH_SECONDS", 1e-4)
    monkeypatch.setattr(gpu_project_grad, "COMPILED", gpu_project_grad.one_einsum)


def test_project_grad():
    batches = {"2x9": [9, 9], "ragged": [5, 0, 8]}
    rows = list(gpu_project_grad.measure("cpu", ((24, 40),), (8,), batches))
    assert {row["provider"] for row in rows} >= {"copy", "matmuls and bmm", "einsum [N,T,k,k]", "logra_kernels"}
    assert all(row["share_of_copy"] > 0 for row in rows if row["provider"] == "logra_kernels")
    assert len(rows) == 5 + 3


def test_scoring(monkeypatch):
    rows = [*gpu_scoring.resident("cpu", 70, 300, (1, 5)), *gpu_scoring.paper("cpu", (3, 4, 500))]
    assert len(rows) == 3 * (1 + len(gpu_scoring.FORMATS) + 2)
    monkeypatch.setattr(gpu_scoring, "TOP", 5)
    assert len(list(gpu_scoring.topk("cpu", 70, 300, 3))) == 1 + 3
    streamed = list(gpu_scoring.streamed("cpu", 40, 4096, 3))
    assert [row["provider"] for row in streamed] == ["bf16", "int8", "int4"]
    assert all(row["share_of_wire"] > 0 and row["over_bf16"] > 0 for row in streamed)


def test_logging():
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {**sizes, "num_key_value_heads": 1, "vocab_size": 64}, (2, 8)
    rows = list(gpu_logging.measure("tiny", None, "cpu", torch.float32, model, 1, peers=(), observed=True))
    assert [row["provider"] for row in rows] == ["plain", "logra_kernels", "hooks", "observed"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_peers_beside_it(monkeypatch):
    """A peer is checked and timed, one whose gradients are wrong is not, and one that fails stops no other."""
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {**sizes, "num_key_value_heads": 1, "vocab_size": 64}, (2, 8)

    def right(net, ids, rank, step, within):
        factors = gpu_logging.own_factors(net, lk.Projection(rank=rank), within)
        return logging_peers.Peer(lambda: gpu_logging.by_hand(net, ids, factors), factors)

    def wrong(net, ids, rank, step, within):
        made = right(net, ids, rank, step, within)
        return logging_peers.Peer(lambda: {name: 1.1 * g for name, g in made.run().items()}, made.factors)

    def failing(net, ids, rank, step, within):
        raise MemoryError("all gone")

    monkeypatch.setattr(gpu_logging, "PEERS", {"a": right, "b": wrong, "c": failing})
    monkeypatch.setattr(gpu_logging, "importable", lambda names: names)
    rows = list(gpu_logging.measure("tiny", None, "cpu", torch.float32, model, 1, peers=("a", "b", "c")))
    timed = {row["provider"] for row in rows if "median_ms" in row}
    assert timed == {"plain", "logra_kernels", "hooks", "a"}
    errors = {row["provider"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"b", "c"}
    assert errors["c"] == "MemoryError: all gone"


def test_a_wrong_kernel_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(gpu_project_grad, "ours", lambda device: {gpu_project_grad.OURS: lambda *args: torch.zeros(1)})
    rows = list(gpu_project_grad.measure("cpu", ((24, 40),), (8,), {"2x9": [9, 9]}))
    assert [("median_us" in row) != ("error" in row) for row in rows] == [True] * 5
    assert ["error" in row for row in rows if row["provider"] == gpu_project_grad.OURS] == [True]


@pytest.fixture
def parts(monkeypatch):
    """part(seconds) beside the others, and what is kept of it when a script stands for it."""

    def ran(script, seconds=60.0, **options):
        monkeypatch.setitem(bench_gpu.PARTS, "a", bench_gpu.Part(lambda: iter(()), seconds))
        kept = []
        command = (sys.executable, "-c", script)
        whole = bench_gpu.run("a", time.monotonic(), lambda part, row: kept.append(row), command=command, **options)
        return whole, kept

    return ran


def test_rows_come_as_they_are_measured(parts):
    assert parts("print('{\"n\": 1}'); print('a word'); print('{\"n\": 2}')") == (True, [{"n": 1}, {"n": 2}])
    assert parts("print('{\"n\": 1}')", seconds=-1) == (False, [])


def test_a_part_that_fails_or_takes_too_long_keeps_the_rows_it_had(parts):
    assert parts("print('{\"n\": 1}'); raise SystemExit(1)") == (False, [{"n": 1}])
    assert parts('print(\'{"n": 1, "error": "wrong"}\')') == (False, [{"n": 1, "error": "wrong"}])
    begun = time.monotonic()
    assert parts("import time; print('{\"n\": 1}', flush=True); time.sleep(60)", seconds=2) == (False, [{"n": 1}])
    assert time.monotonic() - begun < 30


def test_a_part_replaces_its_earlier_rows_alone(tmp_path):
    path = tmp_path / "gpu.json"
    for session in (1, 2):
        results = bench_gpu.Results(path, {"op": "gpu"})
        for part in ("a", "b") if session == 1 else ("b",):
            for n in range(2):
                results.keep(part, {"n": n + session})
    rows = [(row["group"], row["n"]) for row in json.loads(path.read_text())["rows"]]
    assert rows == [("a", 1), ("a", 2), ("b", 2), ("b", 3)]


def test_without_a_device_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    paths = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = [sys.executable, bench_gpu.__file__, "--only", "topk"]
    ran = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert "no CUDA device" in ran.stdout + ran.stderr
    with pytest.raises(SystemExit, match="no such part: top;"):
        bench_gpu.main(["--only", "top"])
