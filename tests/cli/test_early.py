"""What cannot work is said before the model is loaded or run, and what was cut is said at the end."""

import json
import os
import shutil

import pytest
from cli.conftest import SHAPE, call, contents, write_rows
from integrations import tiny_lm

from logra_kernels.cli import checks
from logra_kernels.cli import log as cli_log
from logra_kernels.integrations import causal_lm
from logra_kernels.run import Run
from logra_kernels.store import GradientStore

HALF = r"holds half of a surrogate pair (\ud83d, character 5)"
LONG = " ".join(tiny_lm.WORDS * 9)  # of more than the model's 128 positions


@pytest.fixture
def unloaded(monkeypatch):
    """No model can be loaded in the test."""
    monkeypatch.delattr(causal_lm, "load")


@pytest.fixture
def unobserved(monkeypatch):
    """No sample can be looked at in the test."""
    monkeypatch.delattr(cli_log, "_observe")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("field", ["text", "id"])
def test_half_of_a_surrogate_pair_in_the_data(fails, model_dir, tmp_path, field):
    record = {"text": "the cat", "id": "a"} | {field: "abc \ud83d def"}
    (tmp_path / "data.jsonl").write_text('{"text": "the dog"}\n' + json.dumps(record))
    message = fails("log", model_dir, tmp_path / "data.jsonl", "--out", tmp_path / "store", *SHAPE)
    assert f"data.jsonl line 2: field '{field}' {HALF}" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("field", ["text", "prompt", "completion", "id"])
def test_half_of_a_surrogate_pair_in_a_query(fails, model_dir, whole, tmp_path, field):
    record = {"prompt": "the cat", "completion": " sat"} | {field: "abc \ud83d def"}
    if field == "text":
        record = {"text": record["text"]}
    (tmp_path / "queries.jsonl").write_text('{"text": "the dog"}\n' + json.dumps(record))
    ask = ["query", whole, "--model", model_dir]
    assert f'queries.jsonl line 2: "{field}" {HALF}' in fails(*ask, "--file", tmp_path / "queries.jsonl")
    if field != "id":
        given = ["--prompt", "the cat"] if field == "completion" else []
        assert f"--{field} {HALF}" in fails(*ask, *given, f"--{field}", "abc \ud83d def")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--curvature", "zzz"], "--curvature 'zzz' must be one of identity, raw"),
        (["--curvature", "fisher"], "only a Python program observes (Run.observe_fisher)"),
        (["--curvature", "fisher-fp64"], "only a Python program observes (Run.observe_fisher)"),
        (["--rank-c", "9"], "--rank-c 9 must be 1 to 8"),
        (["--rank-c", "0"], "--rank-c 0 must be 1 to 8"),
        (["--max-length", "1"], "--max-length 1 must be at least 2"),
    ],
)
def test_settings_of_log_that_cannot_be(fails, model_dir, data, tmp_path, option, expected):
    assert expected in fails("log", model_dir, data, "--out", tmp_path / "store", *option)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("unobserved")
def test_more_factors_than_numbers(fails, model_dir, data, tmp_path):
    message = fails("log", model_dir, data, "--out", tmp_path / "store", "--rank", "4", "--rank-c", "2")
    assert "--rank-c 2 keeps 240 numbers of rows of 240; use fewer factors" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["zzz", "fisher"])
def test_a_curvature_that_a_query_cannot_have(fails, model_dir, whole, monkeypatch, kind):
    with monkeypatch.context() as patch:
        patch.delattr(causal_lm, "load")
        message = fails("query", whole, "--model", model_dir, "--text", "the cat", "--curvature", kind)
    expected = {"zzz": "must be one of", "fisher": "; use one of identity, raw"}[kind]
    assert expected in message


def test_a_fisher_that_a_program_observed_is_asked_with(model_dir, whole, memory_dir, capsys):
    store = shutil.copytree(whole, memory_dir / "store")
    model, tokenizer = causal_lm.load(model_dir)
    with Run(store, model, fingerprints=GradientStore.open(store).fingerprints, curvature="fisher") as run:
        batch = causal_lm.encode(tokenizer, tiny_lm.sentences(8))
        with run.observe_fisher(weights=batch.attention_mask):
            causal_lm.loss_sum(model, batch).backward()
    ask = ["query", store, "--model", model_dir, "--text", "the cat sat", "--curvature", "fisher", "-k", "2"]
    assert call(*ask) == 0
    assert "query       query" in capsys.readouterr().out


def test_log_says_how_many_rows_were_cut(model_dir, memory_dir, texts, capsys):
    data, store = write_rows(memory_dir / "data.jsonl", [*texts[:5], LONG, *texts[5:14], LONG]), memory_dir / "store"
    argv = ["log", model_dir, data, "--out", store, *SHAPE]
    assert call(*argv, "--limit", "6") == 0
    assert "cut       1 of the rows logged now, to 128 positions" in capsys.readouterr().out
    assert call(*argv) == 0  # begins within the window of those before
    assert "cut       1 of the rows logged now, to 128 positions" in capsys.readouterr().out
    assert call(*argv) == 0
    assert "cut" not in capsys.readouterr().out
    assert call(*argv[:4], memory_dir / "other", *SHAPE, "--max-length", "6") == 0
    lengths = [len(causal_lm.encode(tiny_lm.tokenizer(), [text]).input_ids[0]) for text in [*texts[:14], LONG, LONG]]
    count = sum(length > 6 for length in lengths)
    assert f"cut       {count} of the rows logged now, to 6 positions" in capsys.readouterr().out


def test_query_says_what_was_cut(whole, model_dir, tmp_path, capsys):
    records = [{"text": "the cat"}, {"text": LONG}, {"prompt": LONG, "completion": " sat on"}]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, records)))
    ask = ["query", whole, "--model", model_dir, "--file", tmp_path / "queries.jsonl", "-k", "2"]
    assert call(*ask, "--report", tmp_path / "page.html") == 0
    first, second, third = capsys.readouterr().out.split("query       ")[1:]
    assert "cut " not in first
    assert "cut         to 128 positions, the most of a row of this store; its end was dropped" in second
    assert "cut         to 128 positions, the most of a row of this store; its prompt's beginning was dropped" in third
    assert "2 of 3 queries, to 128 positions" in (tmp_path / "page.html").read_text()
    assert call(*ask, "--json") == 0
    assert [query["cut_to"] for query in json.loads(capsys.readouterr().out)["queries"]] == [None, 128, 128]


@pytest.mark.usefixtures("unloaded")
def test_a_report_that_cannot_be_written(fails, whole, model_dir, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    ask = ["query", whole, "--model", model_dir, "--text", "the cat", "--report"]
    assert f"folder is a directory; name a file, as {tmp_path}/folder/report.html" in fails(*ask, tmp_path / "folder")
    assert "absent/ is a directory" in fails(*ask, f"{tmp_path}/absent/")
    assert "file is a file" in fails(*ask, tmp_path / "file" / "page.html")
    monkeypatch.setattr(checks.os, "access", lambda path, mode: str(path) != str(tmp_path) and os.path.exists(path))
    assert f"no permission to write in {tmp_path}" in fails(*ask, tmp_path / "new" / "page.html")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'logra-kernels[report]'" in fails(*ask, tmp_path / "page.html")
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
