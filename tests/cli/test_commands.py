"""log -> query -> info on a tiny model, and every kind of bad input: one line, exit code 1, the store as it was."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli.conftest import ROWS, SHAPE, call, contents, write_rows
from integrations import tiny_lm

from logra_kernels.cli import log as cli_log
from logra_kernels.session import Observation
from logra_kernels.store import GradientStore


@pytest.fixture
def store(whole, memory_dir):
    """A finished store of a test's own."""
    return shutil.copytree(whole, memory_dir / "store")


def _query(capsys, *argv):
    capsys.readouterr()
    assert call("query", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


# --- what the commands do ---


def test_the_command_line_from_outside(model_dir, data, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "logra_kernels.cli.main"]
    log = [*command, "log", model_dir, data, "--out", tmp_path / "store", "--limit", "8", "--rank", "4"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(log, capture_output=True, text=True, check=True, env=alone)
    assert "8 rows" in done.stdout
    failed = subprocess.run([*command, "info", tmp_path / "absent"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("logra: error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_help_and_usage(capsys):
    for argv, code in ((["--help"], 0), (["log", "--help"], 0), ([], 2), (["log"], 2), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as left:
            call(*argv)
        assert left.value.code == code
    assert "logra" in capsys.readouterr().out


@pytest.mark.parametrize("observe", [(), ("--observe", "12"), ("--observe", "0")])
def test_log_looks_at_a_sample_first_unless_told_not_to(model_dir, data, memory_dir, observe, monkeypatch):
    seen = []
    batch = Observation.batch
    monkeypatch.setattr(Observation, "batch", lambda self, sharing: seen.append(sharing) or batch(self, sharing))
    argv = ["log", model_dir, data, "--out", memory_dir / "store", "--rank", "4", "--limit", "20", *observe]
    assert call(*argv) == 0
    store = GradientStore.open(memory_dir / "store")
    kind = "orthonormal" if observe == ("--observe", "0") else "pca"
    assert store.projection["kind"] == kind
    assert len(seen) == {(): 3, ("--observe", "12"): 2, ("--observe", "0"): 0}[observe], "batches of 8 rows"
    before = contents(store.path)
    assert call(*argv) == 0
    assert contents(store.path) == before
    assert len(seen) <= 3, "a store that has its factors needs no second look"


def test_log_stores_every_row_with_its_source_and_text(whole, texts):
    store = GradientStore.open(whole)
    assert store.ids == [f"r{i}" for i in range(ROWS)]
    assert store.columns == {"source": [f"book {i % 3}" for i in range(ROWS)], "text": texts}
    assert len(store.layers) == 15
    assert "lm_head" in store.layers
    assert store.dtype == "fp32"


def test_log_summary(model_dir, data, memory_dir, capsys):
    argv = ["log", model_dir, data, "--out", memory_dir / "store", *SHAPE, "--limit", "20", "--dtype", "bf16"]
    assert call(*argv, "--no-text", "--include", "*.mlp.*", "--exclude", "*.down_proj") == 0
    printed = capsys.readouterr().out
    assert "20 rows (0 were there before)" in printed
    assert "64 numbers from 4 layers, bf16" in printed
    assert "rows/s" in printed
    assert GradientStore.open(memory_dir / "store").table.column_names == ["id", "source"]


def test_more_data_goes_on_in_the_same_store(model_dir, data, memory_dir, whole):
    store = memory_dir / "store"
    for limit in (["--limit", "5"], ["--limit", "50"], []):
        assert call("log", model_dir, data, "--out", store, *SHAPE, *limit) == 0
    assert GradientStore.open(store).ids == GradientStore.open(whole).ids
    # Batches of two began at odd rows, where padding differs: equal up to rounding.
    torch.testing.assert_close(GradientStore.open(store).read(0, ROWS), GradientStore.open(whole).read(0, ROWS))


def test_batches_are_of_like_length_and_rows_in_the_datas_order(model_dir, data, memory_dir, texts, monkeypatch):
    seen, log_batch = [], cli_log._log_batch
    monkeypatch.setattr(
        cli_log,
        "_log_batch",
        lambda run, batch, encoded, *rest: seen.append(encoded) or log_batch(run, batch, encoded, *rest),
    )
    stores, positions = [], []
    for window in ("1", "50"):
        seen.clear()
        argv = ["log", model_dir, data, "--out", memory_dir / window, *SHAPE, "--batch-size", "5", "--window", window]
        assert call(*argv) == 0
        assert {len(batch) for batch in seen} == {5}
        stores.append(GradientStore.open(memory_dir / window))
        positions.append(sum(batch.input_ids.numel() for batch in seen))
    tokens = sum(int(batch.attention_mask.sum()) for batch in seen)
    assert tokens <= positions[1] < 1.1 * tokens < positions[0]
    assert stores[0].ids == stores[1].ids
    assert stores[0].columns == stores[1].columns == {"source": [f"book {i % 3}" for i in range(ROWS)], "text": texts}
    torch.testing.assert_close(stores[1].read(0, ROWS), stores[0].read(0, ROWS))


@pytest.mark.parametrize("compacted", [None, [], ["--release-ids"]], ids=str)
def test_a_rerun_after_rows_were_deleted(model_dir, data, store, texts, tmp_path, fails, compacted):
    assert call("delete", store, "--ids", "r0", "r3", f"r{ROWS - 1}") == 0
    more = write_rows(tmp_path / "more.jsonl", [*texts, "the cat sat", "the dog ran over a mat"])
    if compacted is not None:
        assert call("compact", store, *compacted) == 0
    if compacted:
        assert "row 1 of" in fails("log", model_dir, more, "--out", store, *SHAPE)
        return
    assert call("log", model_dir, data, "--out", store, *SHAPE) == 0
    assert call("log", model_dir, more, "--out", store, *SHAPE) == 0
    left = [i for i in range(ROWS + 2) if i not in (0, 3, ROWS - 1)]
    assert GradientStore.open(store).ids == [f"r{i}" for i in left]


def test_a_rerun_of_a_finished_run_changes_nothing(model_dir, data, store, whole):
    assert call("log", model_dir, data, "--out", store, *SHAPE) == 0
    assert contents(store) == contents(whole)


def test_a_stored_text_is_its_own_first_row(whole, model_dir, texts, capsys):
    found = _query(capsys, whole, "--model", model_dir, "--text", texts[17], "-k", "3")
    assert found["mode"] == "relatif"
    (query,) = found["queries"]
    first = query["rows"][0]
    assert (first["id"], first["index"], first["source"], first["text"]) == ("r17", 17, "book 2", texts[17])
    scores = [row["score"] for row in query["rows"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 3


def test_bottom_gives_the_lowest_scores(whole, model_dir, texts, capsys):
    argv = [whole, "--model", model_dir, "--text", texts[3], "--mode", "dot", "--damping", "0.5"]
    top = [row["score"] for row in _query(capsys, *argv, "-k", str(ROWS))["queries"][0]["rows"]]
    bottom = [row["score"] for row in _query(capsys, *argv, "-k", "4", "--bottom")["queries"][0]["rows"]]
    assert bottom == pytest.approx(top[::-1][:4], rel=1e-5)


def test_a_prompt_alone_is_continued_by_the_model(whole, model_dir, capsys):
    argv = ["query", whole, "--model", model_dir, "--prompt", "the cat sat", "--max-new-tokens", "5", "-k", "2"]
    (query,) = _query(capsys, *argv[1:])["queries"]
    assert query["generated"]
    assert call(*argv) == 0
    printed = capsys.readouterr().out
    assert "prompt      the cat sat" in printed
    assert "(written by the model)" in printed
    given = _query(capsys, *argv[1:6], *argv[8:], "--completion", query["completion"])["queries"][0]
    assert not given["generated"]
    assert given["rows"] == query["rows"]


def test_a_file_of_queries_gives_the_answers_of_each_alone(whole, model_dir, texts, tmp_path, capsys):
    file = tmp_path / "queries.jsonl"
    records = [{"text": texts[1]}, {"id": "mine", "prompt": "the cat", "completion": " sat on"}]
    file.write_text("\n\n".join(json.dumps(record) for record in records))
    both = _query(capsys, whole, "--model", model_dir, "--file", file, "-k", "2")["queries"]
    assert [query["id"] for query in both] == ["q0", "mine"]
    alone = _query(capsys, whole, "--model", model_dir, "--prompt", "the cat", "--completion", " sat on", "-k", "2")
    assert [row["id"] for row in both[1]["rows"]] == [row["id"] for row in alone["queries"][0]["rows"]]
    assert both[1]["loss"] == pytest.approx(alone["queries"][0]["loss"], rel=1e-5)


def test_report(whole, model_dir, texts, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert call("query", whole, "--model", model_dir, "--text", texts[2], "-k", "2", "--report", page) == 0
    html = page.read_text()
    assert texts[2] in html
    assert "book 2" in html
    assert str(page) in capsys.readouterr().err


def test_info(whole, capsys):
    assert call("info", whole, "--verify") == 0
    printed = capsys.readouterr().out
    assert f"rows            {ROWS}" in printed
    assert "rank 4" in printed
    assert "self-influence" in printed
    assert "lm_head" in printed
    assert "every checksum fits" in printed


def test_info_before_anything_is_computed(whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("sidecars"))
    assert call("info", copy) == 0
    assert "nothing yet" in capsys.readouterr().out


def test_selftest(monkeypatch, capsys):
    from logra_kernels import selftest

    good = selftest.Check("op", "cpp", "cpu", "float32", 0.0, 1.0, "ok")
    bad = selftest.Check("op", "cpp", "cpu", "float32", 2.0, 1.0, "FAIL", "wrong numbers")
    monkeypatch.setattr(selftest, "run", lambda seed: [good])
    assert call("selftest") == 0
    monkeypatch.setattr(selftest, "run", lambda seed: [good, bad])
    assert call("selftest", "--seed", "3") == 1
    assert "wrong numbers" in capsys.readouterr().out


# --- bad input ---


@pytest.fixture
def unchanged(store):
    """The store, of which every byte must be the same after the test."""
    before = contents(store)
    yield store
    assert contents(store) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--rank", "8"], "made with other settings"),
        (["--dtype", "bf16"], "made with other settings"),
        (["--projection", "gaussian"], "made with other settings"),
        (["--projection", "nonsense"], "kind is 'nonsense'"),
        (["--include", "*.nothing.*"], "'*.nothing.*' matches none"),
        (["--max-length", "64"], "at most 64 tokens"),
        (["--max-length", "1000"], "128 positions"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--window", "0"], "--window 0 must be at least 1"),
        (["--observe", "-1"], "--observe -1 must be at least 0"),
        (["--observe", "0", "--projection", "pca,orthonormal"], "--observe 0 leaves pca,orthonormal nothing to learn"),
        (["--observe", "0", "--projection", "mask", "--curvature", "ekfac"], "--observe 0 leaves ekfac nothing to"),
        (["--text-field", "body"], "'body' is missing; fields found: id, source, text"),
        (["--limit", "10"], "holds 160 rows and the data only 10"),
        (["--device", "nonsense"], "'nonsense' cannot be used"),
    ],
)
def test_log_refuses_settings_that_do_not_fit(fails, model_dir, data, unchanged, change, expected):
    assert expected in fails("log", model_dir, data, "--out", unchanged, *SHAPE, *change)


def test_log_refuses_missing_inputs(fails, model_dir, data, unchanged, tmp_path):
    log = ["--out", unchanged, *SHAPE]
    assert "does not exist" in fails("log", tmp_path / "absent", data, *log)
    assert "no config.json" in fails("log", tmp_path, data, *log)
    assert "does not exist" in fails("log", model_dir, tmp_path / "absent.jsonl", *log)
    (tmp_path / "empty.jsonl").touch()
    assert "holds no rows" in fails("log", model_dir, tmp_path / "empty.jsonl", *log)
    (tmp_path / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": "the\n')
    assert "bad.jsonl line 2: not JSON" in fails("log", model_dir, tmp_path / "bad.jsonl", *log)


def test_log_refuses_other_data_in_the_same_store(fails, model_dir, texts, unchanged, tmp_path):
    changed = write_rows(tmp_path / "data.jsonl", [*texts[:5], "the dog", *texts[6:]])
    assert "the text of row 'r5' has changed" in fails("log", model_dir, changed, "--out", unchanged, *SHAPE)
    (tmp_path / "other.jsonl").write_text('{"text": "the cat"}\n')
    message = fails("log", model_dir, tmp_path / "other.jsonl", "--out", unchanged, *SHAPE)
    assert "row 1" in message
    assert "'other:1'" in message


def test_another_model_is_refused(fails, data, texts, unchanged, tmp_path):
    other = tiny_lm.save(tmp_path / "other", seed=1)
    assert "model: the store has" in fails("log", other, data, "--out", unchanged, *SHAPE)
    assert "model: the store has" in fails("query", unchanged, "--model", other, "--text", texts[0])
    smaller = tiny_lm.save(tmp_path / "smaller", layers=1)
    assert "7 of its 15 layers are not in this one" in fails("log", smaller, data, "--out", unchanged, *SHAPE)
    assert "7 of its 15 layers are not in this one" in fails("query", unchanged, "--model", smaller, "--text", texts[0])


def test_a_folder_that_is_no_store(fails, model_dir, data, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    for argv in (["info", tmp_path], ["query", tmp_path, "--model", model_dir, "--text", "the cat"]):
        assert "not a gradient store" in fails(*argv)
    fails("log", model_dir, data, "--out", tmp_path, *SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("pattern", ["manifest.json", "*-000000000016.safetensors", "*-000000000016.parquet"])
def test_a_damaged_store(fails, store, pattern):
    (file,) = store.glob(pattern)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    before = contents(store)
    assert "damaged" in fails("info", store, "--verify")
    assert contents(store) == before


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--text", "the cat", "--completion", "sat"], "--completion follows a --prompt"),
        (["--text", "the cat", "-k", "0"], "-k 0 must be at least 1"),
        (["--text", ""], "no token to predict"),
        (["--prompt", "the cat", "--completion", ""], "no token to predict"),
        (["--prompt", "the cat", "--max-new-tokens", "500"], "128 positions"),
        (["--file", "absent.jsonl"], "No such file"),
        (["--text", "the cat", "--damping", "-1"], "damping"),
    ],
)
def test_query_refuses(fails, model_dir, unchanged, argv, expected):
    assert expected in fails("query", unchanged, "--model", model_dir, *argv)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "holds no queries"),
        ("{", "line 1: not JSON"),
        ("[]", 'give either "text", or "prompt"'),
        ('{"text": "a", "prompt": "b"}', 'give either "text", or "prompt"'),
        ('{"text": 5}', "must be strings"),
    ],
)
def test_query_refuses_bad_files(fails, model_dir, whole, tmp_path, line, expected):
    (tmp_path / "queries.jsonl").write_text(line)
    assert expected in fails("query", whole, "--model", model_dir, "--file", tmp_path / "queries.jsonl")


def test_nan_loss_names_the_row_and_keeps_the_rows_before(fails, texts, tmp_path, memory_dir):
    model, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.encode("y", add_special_tokens=False)] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    data = write_rows(tmp_path / "data.jsonl", [*texts[:21], "y y y", *texts[21:]])
    store = memory_dir / "store"
    message = fails("log", tmp_path / "broken", data, "--out", store, *SHAPE)
    assert "loss is NaN on row r21" in message
    kept = GradientStore.open(store).ids
    assert kept == [f"r{i}" for i in range(len(kept))]
    assert 12 <= len(kept) <= 21, "the windows before, and of this one what is whole"
    assert call("info", store, "--verify") == 0


def test_debug_shows_the_traceback(tmp_path):
    from logra_kernels.errors import LograError

    with pytest.raises(LograError):
        call("info", tmp_path / "absent", "--debug")
