"""The demo in miniature, from the library's docstrings to the page, and what its stages promise."""

import argparse
from dataclasses import replace

import numpy as np
import pytest

from logra_kernels import demo
from logra_kernels.demo import attribution, main, proof, queries
from logra_kernels.demo.corpus import Corpus, Passage
from logra_kernels.demo.model import new_model, train
from logra_kernels.errors import LograError
from logra_kernels.projection import Projection
from logra_kernels.run import Run

pytest.importorskip("jinja2")


def _arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def small(monkeypatch, settings, corpus):
    """The demo with the tests' small model and corpus."""
    monkeypatch.setattr(main, "Settings", lambda **given: replace(settings, **given))
    monkeypatch.setattr(main, "stdlib_corpus", lambda limit, modules: corpus)


@pytest.fixture
def one_thread():
    """As in the demo, whose numbers do not depend on the number of cores."""
    with main._one_thread():
        yield


@pytest.fixture(scope="module")
def trained(texts, tokenizer, settings):
    model = new_model(settings, tokenizer)
    train(model, tokenizer, texts, replace(settings, steps=40))
    return model


def test_the_whole_demo(small, tmp_path, capsys):
    out = tmp_path / "out"
    options = _arguments("--out", str(out), "--steps", "12", "--removed", "3")
    assert demo.run(options) == 0
    printed = capsys.readouterr().out
    assert f"Report: {out / 'report.html'}" in printed
    for expected in ("q1", "q6", "Value by module", "Proof", "without the top passages"):
        assert expected in printed
    html = (out / "report.html").read_text(encoding="utf-8")
    for expected in ("held-out passage of", "l-RelatIF", "Proof by retraining", "<svg"):
        assert expected in html
    assert (out / "model" / "config.json").is_file()


def test_a_second_run_replaces_the_first(small, tmp_path):
    options = _arguments("--out", str(tmp_path), "--steps", "4", "--no-proof", "--seeds", "2")
    (tmp_path / "notes.txt").write_text("mine")
    assert demo.run(options) == 0
    first = (tmp_path / "report.html").stat().st_mtime_ns
    assert demo.run(options) == 0
    assert (tmp_path / "report.html").stat().st_mtime_ns > first
    assert "Proof by retraining" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "seeds" / "1" / "store").is_dir()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(LograError, match="another --out"):
        demo.run(_arguments("--out", str(tmp_path), "--steps", "1"))
    assert (tmp_path / "model").is_dir()


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--rank", "--removed", "--passages"])
def test_an_impossible_number_is_one_line(option):
    with pytest.raises(LograError, match=f"{option} 0 must be at least"):
        demo.run(_arguments(option, "0"))


def test_scores_are_in_the_corpus_order(corpus, tokenizer, settings, trained, tmp_path):
    run = attribution.log(tmp_path / "s", trained, tokenizer, corpus.train, Projection(rank=4), settings.max_length)
    with run:
        assert sorted(run.store.ids) == sorted(passage.id for passage in corpus.train)
        columns = dict(zip(run.store.ids, run.store.columns["source"], strict=True))
        assert all(columns[passage.id] == passage.source for passage in corpus.train)
        # A passage as its own query has itself on top.
        asked = [queries.Question(f"q{row}", "", corpus.train[row].text, "") for row in (0, 7, 30)]
        found = attribution.ask(run, trained, queries.encode(tokenizer, asked, settings.max_length), corpus.train)
    assert [found.top(query, 1) for query in range(3)] == [[0], [7], [30]]
    assert found.opposing(0, 1)[0] == int(found.ranking[0].argmin())
    values = found.value_by_source(corpus.train)
    assert sum(rows for _, rows, _ in values) == len(corpus.train)
    assert sum(value for *_, value in values) == pytest.approx(float(found.influence.double().sum()), rel=1e-6)
    assert [value for *_, value in values] == sorted((value for *_, value in values), reverse=True)


def test_the_store_answers_for_the_saved_model(small, tmp_path):
    from logra_kernels.integrations import causal_lm

    demo.run(_arguments("--out", str(tmp_path), "--steps", "4", "--no-proof"))
    model, tokenizer = causal_lm.load(tmp_path / "model")
    with Run(tmp_path / "store", model) as run, run.query(ids=["q"]) as query:
        causal_lm.loss_sum(model, causal_lm.encode(tokenizer, ["Return the"])).backward()
    assert len(run.topk(query, k=3).ids[0]) == 3


def test_queries_are_four_continuations_and_two_held_out(corpus, tokenizer, trained, settings):
    asked = queries.questions(trained, tokenizer, corpus)
    assert [question.id for question in asked] == [f"q{i + 1}" for i in range(len(asked))]
    assert [question.prompt for question in asked[:4]] == list(queries.PROMPTS)
    texts = {passage.text for passage in corpus.held_out}
    assert [question.completion in texts for question in asked] == [False] * 4 + [True] * 2
    nll, tokens = queries.losses(trained, queries.encode(tokenizer, asked, settings.max_length))
    assert bool((tokens > 0).all())
    assert proof.per_token(trained, tokenizer, asked, settings.max_length) == pytest.approx((nll / tokens).tolist())


def test_held_out_passages_come_from_the_largest_modules():
    def passages(source: str, count: int) -> list[Passage]:
        return [Passage(f"{source}{i}", f"{source} {i}", source) for i in range(count)]

    corpus = Corpus(passages("big", 5) + passages("mid", 3) + passages("small", 1), [])
    aside = [
        Passage("s", "s", "small"),
        Passage("b1", "b1", "big"),
        Passage("b2", "b2", "big"),
        Passage("m", "m", "mid"),
    ]
    assert [p.id for p in queries.held_out(replace(corpus, held_out=aside), 2)] == ["b1", "m"]


def test_arms_differ_in_the_removed_rows_alone():
    removal = proof.Removal.draw([1, 4, 9], total=50, seed=0)
    assert removal.top == {1, 4, 9}
    assert len(removal.random) == 3
    assert removal.top.isdisjoint(removal.random)
    assert removal == proof.Removal.draw([9, 1, 4], total=50, seed=0)
    assert removal.random != proof.Removal.draw([1, 4, 9], total=50, seed=1).random
    assert proof.Removal.draw(range(6), total=8, seed=0).random == {6, 7}


def test_retraining_differs_from_training_by_the_removed_rows_alone(texts, tokenizer, settings, one_thread):
    asked = [queries.Question("q1", "", texts[0], ""), queries.Question("q2", "Return ", texts[1], "")]
    model = new_model(settings, tokenizer)
    train(model, tokenizer, texts, settings)
    steps: list[int] = []
    arms = {"none": frozenset[int](), "some": frozenset({0, 1})}
    losses = proof.retrain(arms, texts, tokenizer, settings, asked, steps.append)
    assert losses["none"] == proof.per_token(model, tokenizer, asked, settings.max_length)
    assert losses["some"] != losses["none"]
    assert np.isfinite(losses["some"]).all()
    assert sum(steps) == 2 * settings.steps


def test_a_failing_retraining_is_not_waited_for(texts, tokenizer, settings):
    with pytest.raises(LograError, match="no token to predict"):
        proof.retrain({"none": frozenset()}, texts, tokenizer, settings, [queries.Question("q", "x", "", "")])
