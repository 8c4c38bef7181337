"""The demo from corpus to report: train, log, ask, prove; once a seed."""

import argparse
import platform
import shutil
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from logra_kernels import report
from logra_kernels.demo import attribution, console, page, proof, queries
from logra_kernels.demo.corpus import Corpus, stdlib_corpus
from logra_kernels.demo.model import Settings, learn_tokenizer, new_model, train
from logra_kernels.errors import LograError
from logra_kernels.projection import Projection

_MARKER = ".logra-demo"
_OWN = ("model", "store", "seeds", "report.html")


@dataclass
class Clock:
    """Seconds of each stage, added up over the seeds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run(args: argparse.Namespace) -> int:
    """Run the demo; see `arguments.add_arguments` for the options.

    Raises:
        LograError: `--out` holds files of something else.
    """
    out = _clean(Path(args.out))
    transformers.utils.logging.disable_progress_bar()
    clock = Clock()
    settings = Settings() if args.steps is None else Settings(steps=args.steps)
    with clock.stage("corpus and vocabulary"):
        corpus = stdlib_corpus(args.passages, modules=args.modules or None)
        tokenizer = learn_tokenizer([p.text for p in corpus.train], settings.vocabulary)
    modules = len({passage.source for passage in corpus.train})
    console.stage(
        f"{len(corpus.train):,} passages from the docstrings of {modules} modules of Python "
        f"{platform.python_version()} ({len(corpus.held_out)} held out)"
    )
    outcomes = []
    with _one_thread():
        for seed in range(args.seeds):
            place = out if seed == 0 else out / "seeds" / str(seed)
            outcomes.append(_seed(args, place, corpus, tokenizer, replace(settings, seed=seed), clock))
    result = page.build(corpus, settings, outcomes, clock.seconds, rank=args.rank, removed=args.removed)
    for answer in result.answers:
        console.answer(answer)
    console.providers(result.providers)
    if result.proof:
        console.proof(result.proof)
    path = report.render(result, out / "report.html")
    console.stage(f"\nReport: {path}")
    console.stage(f'Ask more: logra query {out / "store"} --model {out / "model"} --prompt "Return the"')
    if args.open:
        webbrowser.open(path.as_uri())
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch one thread, and the former number back.

    In matrices this small threads wait for each other longer than they work, by far so when a core is taken by someone
    else; and with one thread the numbers do not depend on how many cores there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clean(out: Path) -> Path:
    """Make `out`, or empty it of a former run's files; what a demo did not write is left alone.

    Raises:
        LograError: There are files of these names that no demo wrote.
    """
    present = [name for name in _OWN if (out / name).exists()]
    if present and not (out / _MARKER).exists():
        raise LograError(f"{out} holds {present[0]!r}, which no demo wrote; give another --out")
    for name in present:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    return out


def _seed(
    args: argparse.Namespace, place: Path, corpus: Corpus, tokenizer: Any, settings: Settings, clock: Clock
) -> page.Outcome:
    """Train, log, ask and prove with one seed; model and store stay in `place`."""
    name = "" if args.seeds == 1 else f" (seed {settings.seed})"
    texts = [passage.text for passage in corpus.train]
    model = new_model(settings, tokenizer)
    with clock.stage("training"), console.steps("training" + name, settings.steps) as step:
        loss = train(model, tokenizer, texts, settings, on_step=step)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.stage(f"trained{name}: {parameters:,} parameters, {settings.steps} steps, loss {loss:.3f} nats a token")
    with clock.stage("logging"):
        run = attribution.log(
            place / "store",
            model,
            tokenizer,
            corpus.train,
            Projection(rank=args.rank, kind="pca", seed=settings.seed),
            settings.max_length,
            console.progress("logging" + name),
        )
    with clock.stage("queries"), run:
        asked = queries.questions(model, tokenizer, corpus)
        batch = queries.encode(tokenizer, asked, settings.max_length)
        found = attribution.ask(run, model, batch, corpus.train)
    console.stage(f"logged{name}: {len(texts):,} rows of {found.dim:,} numbers from {found.layers} layers")
    nll, tokens = queries.losses(model, batch)
    removed = proof.Removal.draw(found.top_union(args.removed), len(texts), settings.seed)
    losses = {}
    if not args.no_proof:
        arms = {"random": removed.random, "top": removed.top}
        losses["full"] = proof.per_token(model, tokenizer, asked, settings.max_length)
        title = f"training twice again{name}"
        with clock.stage("proof"), console.progress(title)(total=2 * settings.steps, unit="step") as bar:
            losses |= proof.retrain(arms, texts, tokenizer, settings, asked, bar.update)
    return page.Outcome(asked, found, nll.tolist(), tokens.tolist(), removed, losses, parameters)
