"""What bench_gpu measures on a CUDA device, tried on a CPU at small sizes: all providers right, all rows whole."""

import bench_gpu
import gpu_clock
import gpu_logging
import gpu_project_grad
import gpu_scoring
import pytest
import torch


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
    rows = list(gpu_logging.measure("tiny", None, "cpu", torch.float32, model, 1))
    assert [row["provider"] for row in rows] == ["plain", "logra_kernels", "hooks"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_parts_that_there_is_no_time_for_are_named(monkeypatch):
    kept = {}
    monkeypatch.setitem(bench_gpu.PARTS, "a", lambda: iter([{"n": 1}, {"n": 2}]))
    monkeypatch.setitem(bench_gpu.PARTS, "b", lambda: iter([{"n": 3}]))
    assert bench_gpu.run(["a", "b"], kept.__setitem__) == []
    assert kept == {"a": [{"n": 1}, {"n": 2}], "b": [{"n": 3}]}
    assert bench_gpu.run(["a", "b"], kept.__setitem__, seconds=-1) == ["a", "b"]


def test_a_part_that_fails_keeps_nothing_and_stops_no_other(monkeypatch):
    def wrong():
        yield {"n": 1}
        raise AssertionError

    kept = {}
    monkeypatch.setitem(bench_gpu.PARTS, "a", wrong)
    monkeypatch.setitem(bench_gpu.PARTS, "b", lambda: iter([{"n": 3}]))
    assert bench_gpu.run(["a", "b"], kept.__setitem__) == ["a"]
    assert kept == {"b": [{"n": 3}]}
