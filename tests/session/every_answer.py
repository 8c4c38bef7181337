"""Every number that a run gives, of one tiny language model in several settings."""

import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.influence import MODES

ROWS, LENGTH, VOCABULARY = 24, 6, 16

SETTINGS = {
    "pca": {"kinds": ["linear", "embedding"]},
    "int8": {"dtype": "int8", "block": 32, "curvature": "ekfac"},
    "int4 factors": {"dtype": "int4", "block": 32, "rank_c": 1, "projection": lk.Projection(rank=4)},
    "frozen bf16": {"projection": lk.Projection(rank=4, kind="gaussian"), "projection_dtype": torch.bfloat16},
    "low rank": {"curvature": lk.curvature.LowRank.of_rank(3), "projection": lk.Projection(rank=4, kind="sjlt")},
    "identity": {"curvature": "identity", "projection": lk.Projection(kind="identity")},
    "blocks": {"curvature": "raw", "blocks": {"all": ["*"]}, "statistics_device": "cpu", "fisher_while_logging": True},
}


class TinyLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.mlp, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids):
        x = self.wte(ids)
        return self.head(x + torch.tanh(self.mlp(x)))


def lm_loss(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def make_case(settings: str) -> tuple[TinyLM, torch.Tensor]:
    """(model, token ids [ROWS, LENGTH])."""
    model = TinyLM().requires_grad_("frozen" not in settings)
    model.wte.weight.requires_grad_(True)
    return model, torch.randint(VOCABULARY, (ROWS, LENGTH))


def answers(path, model, ids, settings) -> dict[str, torch.Tensor]:
    """What is asked of a run that logged `ids`, the stored rows last."""
    run = lk.Run(path / "store", model, **settings)
    for part in ids.split(8):
        with run.observe():
            lm_loss(model, part).backward()
    for start in range(0, ROWS, 7):
        part = ids[start : start + 7]
        names = [f"r{i}" for i in range(start, start + len(part))]
        with run.log(names, columns={"source": [name[-1] for name in names]}):
            lm_loss(model, part).backward()
    run.finalize()
    with run.query(["q0", "q1", "q2"]) as query:
        lm_loss(model, ids[:3].flip(1)).backward()
    found = {f"scores {mode}": run.scores(query, mode) for mode in MODES}
    keep = lk.influence.row_mask(run.statistics().l2_over_l1, quantile=0.9)
    top = run.topk(query, 5, rows=keep, layers=True)
    found |= {"top": top.values, "index": top.indices} | vars(run.statistics())
    found |= {f"part {name}": part for name, part in top.layers.items()}
    for name, part in zip(("high", "low"), run.extremes(query, 3), strict=True):
        found[name] = part.values
    found |= {f"group {name}": part for name, part in run.group_scores(query).items()}
    found["value"] = run.value(query).by_query
    with run.tokens(query) as tokens:
        lm_loss(model, ids[:2]).backward()
    found["tokens"] = tokens.shares
    found["stored"] = run.stored(["r3", "r1"]).rows
    run.build_index(dims=8, k=3, samples=4)
    found["shortlisted"] = run.topk(query, 3, search="index").values
    if run.store.rank_c is None:
        whitening = lk.influence.whitening_of(lk.curvature.RawFisher.of(run.store))
        small = lk.store.quantize(run.store.path, path / "small", "int4", block=32, whitening=whitening)
        found["quantised"] = small.score(query.rows)
        found["int8 queries"] = small.topk(query.rows, 3, query_format="int8")[0]
    run.delete(["r5"])
    found["after a deletion"] = run.scores(query)
    found["read"] = run.store.read(0, len(run.store))
    run.close()
    return found
