"""nn.MultiheadAttention: its projections' gradients for each sample, against autograd of PyTorch's own forward."""

import copy
import pickle
import warnings
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk

N, L, S, E, H = 3, 5, 7, 8, 2
SMALL, WHOLE = lk.Projection(rank=4), lk.Projection(kind="identity")

# what the module is made with; how it is called
MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 6, "vdim": 4},
    "kdim, batch_first": {"kdim": 6, "batch_first": True, "bias": False},
}
CALLS = {
    "no weights": {"need_weights": False},
    "weights": {"need_weights": True},
    "weights of heads": {"need_weights": True, "average_attn_weights": False},
    "bool masks": {"attn_mask": "bool", "key_padding_mask": "bool", "need_weights": False},
    "float masks": {"attn_mask": "float", "key_padding_mask": "float"},
    "padding": {"key_padding_mask": "bool", "need_weights": False},
    "mask of heads": {"attn_mask": "heads", "key_padding_mask": "bool"},
    "mask of heads, no weights": {"attn_mask": "heads", "need_weights": False},
}
INPUTS = ["self", "cross", "three", "same query and key"]


class Attends(nn.Module):
    """An attention whose inputs are given samples first, and whose samples come first out of it."""

    def __init__(self, inputs="self", **made) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **made)
        self.inputs, self.call = inputs, {}
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x, z, samples=slice(None)):
        attention = self.attention
        given = {"self": (x, x, x), "cross": (x, z, z), "three": (x, z, z.sin()), "same query and key": (x, x, x.sin())}
        widths = E, attention.kdim, attention.vdim
        given = tuple(
            one if width == E else one[..., :width] for one, width in zip(given[self.inputs], widths, strict=True)
        )
        masks = masks_of(self.call, given[0].shape[1], given[1].shape[1], samples, x.dtype)
        if not attention.batch_first:
            seen: dict[int, torch.Tensor] = {}  # the same tensors stay the same
            given = tuple(seen.setdefault(id(one), one.transpose(0, 1).contiguous()) for one in given)
        y, weights = attention(*given, **{**self.call, **masks})
        return y if attention.batch_first else y.transpose(0, 1), weights


def masks_of(call, length, s, samples, dtype):
    n = len(range(N)[samples])
    draw = torch.Generator().manual_seed(length * s)
    masks = {}
    if "key_padding_mask" in call:
        padding = torch.zeros(N, s, dtype=torch.bool)
        padding[1, s - 2 :] = padding[2, 1] = True
        masks["key_padding_mask"] = padding[samples]
    if "attn_mask" in call:
        mask = torch.rand(N, H, length, s, generator=draw) > 0.7
        mask[..., 0] = False
        masks["attn_mask"] = mask[samples].reshape(n * H, length, s) if call["attn_mask"] == "heads" else mask[0, 0]
        if call["attn_mask"] == "float":
            masks["attn_mask"] = torch.randn(length, s, generator=draw).to(dtype)
            masks["key_padding_mask"] = padding[samples].to(dtype) * -3
    return masks


def model_of(inputs="self", call=None, **made):
    torch.manual_seed(1)
    model = Attends(inputs, **made).double().eval()
    model.call = dict(call or {})
    return model, torch.randn(N, L, E).double(), torch.randn(N, S, E).double()


def loss_of(model, x, z, samples=slice(None)):
    y, weights = model(x[samples], z[samples], samples)
    loss = (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).sum() + y.square().sum()
    return loss if weights is None else loss + (weights**3).sum()


def weights_of(attention, bias=False):
    """Layer -> its weight and the slice of its bias, as one-sample autograd sees them."""
    e, cut = attention.embed_dim, {"in_proj": slice(None)}
    if attention.in_proj_weight is None:
        cut = {name: slice(i * e, (i + 1) * e) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    found = {name: (getattr(attention, f"{name}_weight"), attention.in_proj_bias, rows) for name, rows in cut.items()}
    return {**found, "out_proj": (attention.out_proj.weight, attention.out_proj.bias, slice(None))}


def exact_rows(model, taps, x, z, bias=False):
    rows = {f"attention.{name}": [] for name in weights_of(model.attention)}
    for i in range(N):
        for name, (weight, b, cut) in weights_of(model.attention).items():
            loss = loss_of(model, x, z, slice(i, i + 1))
            grads = torch.autograd.grad(loss, [weight, b] if bias else [weight])
            dw = torch.cat([grads[0], grads[1][cut, None]], 1) if bias else grads[0]
            p_in, p_out = taps.factors[f"attention.{name}"]
            rows[f"attention.{name}"].append(dw if p_in is None else p_out @ dw @ p_in.T)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def assert_rows(got, exact, tolerance=1e-10):
    assert list(got) == list(exact)
    for name, one in exact.items():
        assert one.abs().max() > 1e-3, name
        torch.testing.assert_close(got[name], one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("projection", [SMALL, WHOLE], ids=["projected", "whole"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("made", MODULES)
def test_rows_of_every_module(made, inputs, projection):
    model, x, z = model_of(inputs, **MODULES[made])
    with lk.capture(model, projection) as taps:
        loss_of(model, x, z).backward()
    assert_rows(taps.grads, exact_rows(model, taps, x, z))
    assert "forward" not in vars(model.attention)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_rows_of_every_call(call, batch_first):
    for inputs in INPUTS:
        model, x, z = model_of(inputs, CALLS[call], batch_first=batch_first, add_zero_attn=inputs == "three")
        with lk.capture(model.requires_grad_(inputs == "self"), SMALL) as taps:
            loss_of(model, x, z).backward()
        assert_rows(taps.grads, exact_rows(model.requires_grad_(), taps, x, z))


@pytest.mark.parametrize("length", [N, 1])
def test_samples_are_those_of_the_layout_where_positions_are_as_many(length):
    model, x, z = model_of("cross")
    x, z = x[:, :length], z[:, :length]
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, z).backward()
    assert_rows(taps.grads, exact_rows(model, taps, x, z))


@pytest.mark.parametrize("made", ["batch_first", "kdim"])
def test_biases(made):
    model, x, z = model_of("cross", **MODULES[made])
    with lk.capture(model, SMALL, bias=True) as taps:
        loss_of(model, x, z).backward()
    assert_rows(taps.grads, exact_rows(model, taps, x, z, bias=True))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("call", CALLS)
def test_outputs_and_gradients_are_pytorchs(call, train):
    for inputs in INPUTS:
        for made in MODULES.values():
            model, x, z = model_of(inputs, CALLS[call], **made, dropout=0.3)
            found = []
            for tapped in (False, True):
                model.float().train(train).zero_grad()
                a, b = x.float().requires_grad_(), z.float().requires_grad_()
                taps = lk.capture(model, SMALL)
                with taps if tapped else nullcontext():
                    torch.manual_seed(3)
                    y, weights = model(a, b)
                    after = torch.rand(2)
                    (y.square().sum() + (0 if weights is None else (weights**3).sum())).backward()
                grads = [p.grad.clone() for p in model.parameters()] + [a.grad, b.grad]
                found.append([y.detach(), weights, after, *grads])
                assert not tapped or len(taps.grads) == len(taps.layers)
            assert found[0][0].is_contiguous() <= found[1][0].is_contiguous()
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_causal_hint():
    model, x, _ = model_of(batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)

    def loss(part, causal):
        y, _ = model.attention(x[part], x[part], x[part], attn_mask=mask, is_causal=causal, need_weights=not causal)
        return (y**3).sum()

    with lk.capture(model, SMALL) as taps:
        loss(slice(None), True).backward()
        with pytest.raises(RuntimeError, match="is_causal is a hint that needs attn_mask"):
            model.attention(x, x, x, is_causal=True)
    (dw,) = torch.autograd.grad(loss(slice(1, 2), False), [model.attention.in_proj_weight])
    p_in, p_out = taps.factors["attention.in_proj"]
    torch.testing.assert_close(taps.grads["attention.in_proj"][1], p_out @ dw @ p_in.T)


@pytest.mark.parametrize("masks", [{"attn_mask": (1, L)}, {"key_padding_mask": (1, L)}, {"attn_mask": (N, L, L)}])
def test_masks_of_another_shape_are_refused_as_pytorch_does(masks):
    model, x, _ = model_of(batch_first=True)
    given = {name: torch.zeros(shape).double() for name, shape in masks.items()}
    with pytest.raises((RuntimeError, AssertionError)):
        model.attention(x, x, x, **given)
    with lk.capture(model), pytest.raises(RuntimeError, match="must be"):
        model.attention(x, x, x, **given)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.Transformer(E, H, 2, 2, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(E, 4)

    def forward(self, x, z, padding):
        causal = nn.Transformer.generate_square_subsequent_mask(z.shape[1], dtype=x.dtype)
        h = self.transformer(
            x, z, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.head(h)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("frozen", [True, False])
def test_the_whole_of_a_run(tmp_path, frozen):
    model = Translator().double().eval().requires_grad_(not frozen)
    x, z = torch.randn(N, L, E).double(), torch.randn(N, S, E).double()
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()

    def loss(part):
        return (model(x[part], z[part], padding[part]) ** 3).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="capture")
        run = lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4, kind="pca"))
    with run:
        assert "transformer.decoder.layers.1.multihead_attn.in_proj" in run.taps.layers
        with run.observe():
            loss(slice(None)).backward()
        with run.log(["a", "b", "c"]):
            loss(slice(None)).backward()
        run.finalize()
        with run.query(["q"]) as query:
            loss(slice(1, 2)).backward()
        assert run.topk(query, k=1).ids == [["b"]]
        report = run.verify(loss, samples=N)
        assert report.ok, str(report)
        assert report.error < 1e-10
        assert not report.notes
        rows, holders = run.store.read(0, N), run.taps.holders
        parameters = [adapter.parameters(module)[0].requires_grad_() for ((module, adapter),) in holders.values()]
        for i in range(N):
            dws = torch.autograd.grad(loss(slice(i, i + 1)), parameters)
            pairs = zip(dws, run.taps.factors.values(), strict=True)
            exact = torch.cat([(p_out @ dw @ p_in.T).flatten() for dw, (p_in, p_out) in pairs])
            torch.testing.assert_close(rows[i].double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_token_shares_add_up(tmp_path):
    model, x, z = model_of(batch_first=True)
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
        with run.log(["a", "b", "c"]):
            loss_of(model, x, z).backward()
        query = run.stored(["a", "b"])
        with run.tokens(query) as tokens:
            loss_of(model, x, z).backward()
        assert tokens.shares.shape == (2, N, L)
        torch.testing.assert_close(tokens.shares.sum(-1).float(), run.scores(query), rtol=1e-4, atol=1e-4)


def test_autocast():
    model, x, z = model_of(batch_first=True)
    model, x, z, exact = model.float(), x.float(), z.float(), None
    for under in (False, True):
        with lk.capture(model, SMALL) as taps, torch.autocast("cpu", torch.bfloat16, enabled=under):
            loss_of(model, x, z).backward()
        exact = exact or taps.grads
    assert all(0 < (got - exact[name]).norm() < 0.05 * exact[name].norm() for name, got in taps.grads.items())


def test_checkpointing_and_weights_of_positions():
    model, x, _ = model_of(batch_first=True)
    counted = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).double()

    def loss(part):
        y = checkpoint(lambda a: model.attention(a, a, a, need_weights=False)[0], x[part], use_reentrant=False)
        return (y**3 * counted[part][..., None]).sum()

    x.requires_grad_()
    with lk.capture(model, SMALL) as taps:
        taps.reset(N, weights=torch.ones(N, L))
        loss(slice(None)).backward()
    for i in range(N):
        (dw,) = torch.autograd.grad(loss(slice(i, i + 1)), [model.attention.in_proj_weight])
        p_in, p_out = taps.factors["attention.in_proj"]
        torch.testing.assert_close(taps.grads["attention.in_proj"][i], p_out @ dw @ p_in.T)


def test_documents_packed_in_a_row():
    model, x, _ = model_of(batch_first=True)
    cuts = [0, 2, 3, L]
    apart = torch.ones(L, L, dtype=torch.bool)
    for start, stop in pairwise(cuts):
        apart[start:stop, start:stop] = False
    with lk.capture(model, SMALL) as taps:
        taps.reset(offsets=torch.tensor(cuts))
        (model.attention(x[:1], x[:1], x[:1], attn_mask=apart)[0] ** 3).sum().backward()
    for i, (start, stop) in enumerate(pairwise(cuts)):
        part = x[:1, start:stop]
        dw, dv = torch.autograd.grad(
            (model.attention(part, part, part)[0] ** 3).sum(),
            [model.attention.in_proj_weight, model.attention.out_proj.weight],
        )
        for name, one in (("in_proj", dw), ("out_proj", dv)):
            p_in, p_out = taps.factors[f"attention.{name}"]
            torch.testing.assert_close(taps.grads[f"attention.{name}"][i], p_out @ one @ p_in.T)


def test_compiled():
    torch._dynamo.reset()
    model, x, z = model_of("cross", CALLS["padding"], batch_first=True)
    with lk.capture(model, SMALL) as taps:
        compiled = torch.compile(model.attention, fullgraph=True, backend="aot_eager")
        taps.reset(N)
        padding = masks_of(model.call, L, S, slice(None), x.dtype)["key_padding_mask"]
        y, _ = compiled(x, z, z, key_padding_mask=padding, need_weights=False)
        (y**3).sum().backward()
        got = taps.grads
        taps.reset(N)
        y, _ = model.attention(x, z, z, key_padding_mask=padding, need_weights=False)
        (y**3).sum().backward()
    assert_rows(got, taps.grads)
    torch._dynamo.reset()


def test_taps_of_two_captures_come_and_go_in_any_order():
    model, x, z = model_of()
    exact = None
    for first in (0, 1):
        both = [lk.capture(model, SMALL, include=["*.in_proj"]), lk.capture(model, SMALL)]
        for taps in both:
            taps.attach()
        for taps in both:
            taps.active = True
            loss_of(model, x, z).backward()
            taps.active = False
        both[first].detach()
        left = both[1 - first]
        left.reset()
        left.active = True
        loss_of(model, x, z).backward()
        left.detach()
        exact = exact or exact_rows(model, both[1], x, z)
        assert_rows(left.grads, {name: exact[name] for name in left.layers})
        assert "forward" not in vars(model.attention)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_forward(again):
    model, x, z = model_of()
    with lk.capture(model, SMALL):
        other = again(model)
    assert not isinstance(other.attention.forward, lk.nn.adapters.ReplacedForward)
    torch.testing.assert_close(loss_of(other, x, z), loss_of(model, x, z))


@pytest.mark.parametrize("include", ["*.in_proj", "*.out_proj"])
def test_some_of_the_projections(include):
    model, x, z = model_of("cross")
    exact = exact_rows(model, lk.capture(model, SMALL), x, z)
    with lk.capture(model, SMALL, [include]) as taps:
        loss_of(model, x, z).backward()
    assert_rows(taps.grads, {name: exact[name] for name in taps.layers})


def test_what_is_not_attended_in_pytorchs_way_is_named():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    model = nn.ModuleDict({"own": Own(E, H), "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"'own' .Own.; write"):
        assert list(lk.capture(model).layers) == ["fc"]


def test_a_sample_by_itself_is_refused():
    model, x, _ = model_of(batch_first=True)
    with lk.capture(model), pytest.raises(ValueError, match=r"query \(5, 8\) without samples; give it a batch"):
        model.attention(x[0], x[0], x[0])
