"""`logra plan` for a model and for a store."""

import re

from cli.conftest import ROWS, call

from logra_kernels.store import GradientStore


def test_a_model(model_dir, capsys):
    assert call("plan", model_dir, "--rank", "4", "--batch-size", "2", "--rows", "1000", "--max-length", "16") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^log .* h for 1,000 rows of full length, [\d.,]+ rows/s$", shown, re.M)
    assert re.search(r"^log, memory +\d[\d.,]* [MG]B$", shown, re.M)
    for name in ("fp32", "bf16", "int8", "int4"):
        assert re.search(rf"^{name} +[\d,]+ +[\d.,]+ [kMGT]B +[\d.,]+ [MG]B$", shown, re.M)


def test_a_store(whole, capsys):
    assert call("plan", whole, "--queries", "3", "-k", "5") == 0
    shown = capsys.readouterr().out
    store = GradientStore.open(whole)
    assert f"rows            {ROWS:,} of {store.dim:,} numbers" in shown
    assert "3 queries for 5 rows each" in shown
    assert f"{store.manifest.row_bytes:,}" in shown
    assert "bf16" not in shown


def test_what_cannot_be_planned(whole, tmp_path, capsys):
    assert call("plan", whole, "-k", "0") == 1
    assert "k 0" in capsys.readouterr().err
    assert call("plan", tmp_path / "nothing") == 1
    assert capsys.readouterr().err.count("\n") == 1
