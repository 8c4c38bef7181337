"""`logra plan` for a model and for a store."""

import re
import sys

import pytest
from cli.conftest import ROWS, call

from logra_kernels.cli import session
from logra_kernels.integrations import causal_lm
from logra_kernels.store import GradientStore


def test_a_model(model_dir, capsys):
    assert call("plan", model_dir, "--rank", "4", "--batch-size", "2", "--rows", "1000", "--max-length", "16") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^log .* h for 1,000 rows of full length, [\d.,]+ rows/s$", shown, re.M)
    assert re.search(r"^log, memory +\d[\d.,]* [MG]B$", shown, re.M)
    assert re.search(r"^observe +[\d.,]+ h for 256 rows of full length$", shown, re.M)
    for name in ("fp32", "bf16", "int8", "int4"):
        assert re.search(rf"^{name} +[\d,]+ +[\d.,]+ [kMGT]B +[\d.,]+ [MG]B$", shown, re.M)


def test_a_model_whose_factors_are_drawn(model_dir, capsys):
    argv = ["plan", model_dir, "--rank", "4", "--batch-size", "2", "--rows", "100", "--max-length", "16"]
    assert call(*argv, "--observe", "0") == 0
    assert "observe" not in capsys.readouterr().out
    assert call(*argv) == 0
    assert " h for 100 rows of full length\n" in capsys.readouterr().out, "no more rows than there are"
    assert call(*argv, "--observe", "-1") == 1
    assert "--observe is -1" in capsys.readouterr().err


def test_rows_that_wait_for_others_are_planned():
    layers = {"a": (64, 64), "b": (16, 64)}
    dim = 64 * 64 + 16 * 64
    assert session.window_rows(128, 8, layers) == 128
    assert session.window_rows(100, 8, layers) == 96
    assert session.window_rows(1, 8, layers) == 8
    assert session.window_bytes(100, 8, layers) == 96 * 4 * dim
    wide = {f"{i}": (64, 64) for i in range(1000)}
    assert session.window_rows(128, 8, wide) == 16
    assert session.window_bytes(128, 8, wide) <= 256 << 20
    assert session.window_rows(128, 64, wide) == 64, "one batch at least"


def test_the_memory_of_a_window_is_shown(model_dir, monkeypatch, capsys):
    def megabytes(waiting):
        monkeypatch.setattr(session, "window_bytes", lambda *_: waiting)
        monkeypatch.setattr(sys.modules["logra_kernels.plan"], "peak_bytes", lambda: 10**9)
        assert call("plan", model_dir, "--rank", "4", "--batch-size", "2", "--max-length", "16") == 0
        return float(re.search(r"^log, memory +([\d.,]+) MB$", capsys.readouterr().out, re.M)[1].replace(",", ""))

    assert megabytes(-(500 * 10**6)) == pytest.approx(megabytes(-(700 * 10**6)) + 200, abs=1)


def test_a_model_whose_rows_are_kept_as_factors(model_dir, capsys):
    argv = ["plan", model_dir, "--rank", "4", "--batch-size", "2", "--rows", "1000", "--max-length", "16"]
    assert call(*argv, "--rank-c", "1") == 0
    shown = capsys.readouterr().out
    layers, dim = (
        int(found.replace(",", ""))
        for found in re.search(
            r"^layers +(\d+)$.*^rows +1,000 of ([\d,]+) numbers, kept as 1 factors", shown, re.M | re.S
        ).groups()
    )
    assert dim == layers * 16
    assert re.search(rf"^fp32 +{4 * layers * (4 + 4):,} ", shown, re.M)  # u [4] and v [4] of each layer
    assert call(*argv, "--rank-c", "2") == 1
    assert "use fewer factors" in capsys.readouterr().err


def test_a_store_of_factors(model_dir, data, tmp_path, capsys):
    path = tmp_path / "s"
    log = ["log", model_dir, data, "--out", path, "--rank", "4", "--projection", "orthonormal", "--limit", "6"]
    assert call(*log, "--rank-c", "1", "--dtype", "bf16") == 0
    store = GradientStore.open(path)
    assert store.rank_c == 1
    assert store.manifest.row_bytes == 2 * 8 * len(store.layers)
    capsys.readouterr()
    assert call("plan", path) == 0
    shown = capsys.readouterr().out
    assert f"rows            6 of {store.dim:,} numbers, kept as 1 factors a layer" in shown
    assert re.search(rf"^bf16 +{store.manifest.row_bytes:,} ", shown, re.M)
    assert call("plan", path, "--rank-c", "2") == 1
    assert "rank_c 2 for a store that has 1" in capsys.readouterr().err
    assert call(*log, "--rank-c", "9") == 1
    assert "--rank-c 9 must be 1 to 8" in capsys.readouterr().err
    assert call(*log, "--rank-c", "2") == 1
    assert "rank_c (1 there, 2 here)" in capsys.readouterr().err


def test_a_store(whole, capsys):
    assert call("plan", whole, "--queries", "3", "-k", "5") == 0
    shown = capsys.readouterr().out
    store = GradientStore.open(whole)
    assert f"rows            {ROWS:,} of {store.dim:,} numbers" in shown
    assert "3 queries for 5 rows each" in shown
    assert f"{store.manifest.row_bytes:,}" in shown
    assert "bf16" not in shown


@pytest.mark.parametrize(
    ("option", "expected"),
    [(("--rank-c", "9"), "--rank-c 9 must be 1 to 8"), (("--max-length", "1"), "--max-length 1 must be at least 2")],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(model_dir, monkeypatch, fails, option, expected):
    monkeypatch.delattr(causal_lm, "load")
    assert expected in fails("plan", model_dir, *option)


def test_what_cannot_be_planned(whole, tmp_path, capsys):
    assert call("plan", whole, "-k", "0") == 1
    assert "k 0" in capsys.readouterr().err
    assert call("plan", tmp_path / "nothing") == 1
    assert capsys.readouterr().err.count("\n") == 1
