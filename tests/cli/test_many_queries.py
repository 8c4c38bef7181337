"""A file of more queries than are asked together, in batches of like length."""

import json

import pytest
from cli.conftest import call

from logra_kernels.cli import query as cli_query
from logra_kernels.integrations import causal_lm
from logra_kernels.run import Run
from logra_kernels.store import GradientStore

PROMPTS = ["the cat", "a dog ran over the mat and then", "old", "the red bird sat", "near a blue river the dog slept"]


@pytest.fixture
def file(tmp_path, texts):
    records = [{"id": f"p{i}", "prompt": prompt, "completion": " sat on a log"} for i, prompt in enumerate(PROMPTS)]
    records += [{"id": f"t{i}", "text": text} for i, text in enumerate(texts[:4])]
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize("mode", ["relatif", "dot"])
def test_each_is_answered_as_if_it_were_alone(whole, model_dir, file, tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setattr(cli_query, "_TOGETHER", 4)
    asked, worth = [], []
    topk, providers = Run.topk, cli_query.providers
    monkeypatch.setattr(Run, "topk", lambda self, query, **kw: asked.append(query) or topk(self, query, **kw))
    monkeypatch.setattr(cli_query, "providers", lambda *a: worth.append(providers(*a)) or worth[0])
    capsys.readouterr()
    argv = ["query", whole, "--model", model_dir, "--file", file, "-k", "3", "--mode", mode, "--batch-size", "2"]
    assert call(*argv, "--json", "--report", tmp_path / "page.html") == 0
    found = json.loads(capsys.readouterr().out)["queries"]
    ids = [f"p{i}" for i in range(5)] + [f"t{i}" for i in range(4)]
    assert [query["id"] for query in found] == ids
    assert [query.ids for query in asked] == [ids[:4], ids[4:8], ids[8:]]
    model, tokenizer = causal_lm.load(model_dir)
    store = GradientStore.open(whole)
    values = dict.fromkeys(store.columns["source"], 0.0)
    with Run(whole, model, fingerprints=store.fingerprints) as run:
        for query in found:
            batch = causal_lm.encode(tokenizer, [query["prompt"]], completions=[query["completion"]], max_length=128)
            with run.query([query["id"]]) as alone:
                loss = causal_lm.loss_sum(model, batch)
                loss.backward()
            assert query["loss"] == pytest.approx(float(loss), rel=1e-5)
            assert query["tokens"] == int((batch.labels != causal_lm.IGNORED).sum())
            scores = run.scores(alone, mode=mode)[0]
            top = scores.topk(3)
            assert [row["index"] for row in query["rows"]] == top.indices.tolist()
            assert [row["score"] for row in query["rows"]] == pytest.approx(top.values.tolist(), rel=1e-4)
            for source, score in zip(store.columns["source"], scores.tolist(), strict=True):
                values[source] += score
    (worth,) = worth
    assert {provider.source: provider.value for provider in worth} == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert [provider.value for provider in worth] == sorted((p.value for p in worth), reverse=True)
    assert sum(provider.rows for provider in worth) == len(store)
