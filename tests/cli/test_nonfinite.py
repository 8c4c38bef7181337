"""`logra log` on a model that gives NaN for one word: refused with the row's name, or gone on without these rows."""

import pytest
import torch
from cli.conftest import SHAPE, call, contents, write_rows
from integrations import tiny_lm

from logra_kernels.store import GradientStore


@pytest.fixture
def broken(tmp_path):
    """A model that is NaN on the word "bird" (with a space before it), and 20 texts of which some hold it."""
    pytest.importorskip("transformers")
    model, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    tokens = tokenizer(" bird", add_special_tokens=False).input_ids
    assert len(tokens) == 1
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[0]] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"the cat ran {'bird' if i in (4, 11) else 'dog'} sat on a mat" for i in range(20)]
    return tmp_path / "model", write_rows(tmp_path / "data.jsonl", texts)


@pytest.mark.filterwarnings("ignore:log:UserWarning")
def test_raise_and_skip(broken, memory_dir, capsys, fails):
    argv = ["log", *broken, "--out", memory_dir / "store", *SHAPE]
    assert "NaN on row r4" in fails(*argv)
    assert call(*argv, "--nonfinite", "skip") == 0
    printed = capsys.readouterr().out
    assert "18 rows (4 were there before)" in printed
    assert "skipped   2 rows whose gradient is NaN or infinite" in printed
    store = GradientStore.open(memory_dir / "store")
    assert store.ids == [f"r{i}" for i in range(20) if i not in (4, 11)]
    before = contents(store.path)
    assert call(*argv, "--nonfinite", "skip") == 0
    assert "18 rows (18 were there before)" in capsys.readouterr().out
    assert contents(store.path) == before
    assert call("info", store.path) == 0
    assert "skipped         2 rows of NaN or infinity: r4, r11" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:log:UserWarning")
def test_rows_that_are_skipped_are_not_observed_either(broken, memory_dir, fails):
    argv = ["log", *broken, "--out", memory_dir / "store", "--rank", "4", "--batch-size", "2"]
    assert "NaN on row r" in fails(*argv)
    assert call(*argv, "--nonfinite", "skip") == 0
    store = GradientStore.open(memory_dir / "store")
    assert store.projection["kind"] == "pca"
    assert len(store) == 18
