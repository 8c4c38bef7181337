"""Taps that are given one tensor project it once, and whatever else they are given each by itself."""

import copy
import pickle
import threading

import pytest
import torch
from nn.sharing import (
    ALONE,
    EVERY,
    PATHS,
    RANK,
    SMALL,
    TOGETHER,
    WIDTH,
    Case,
    N,
    Net,
    T,
    loss_of,
    name_of,
    tapped,
    widths_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk
from logra_kernels import _C
from logra_kernels.nn.shared_inputs import MOST_FAILURES, SharedInputs

case = pytest.fixture(params=EVERY, ids=name_of)(tapped)


@pytest.fixture
def made(monkeypatch):
    """The widths k of the projections that the C++ has made."""
    widths: list[int] = []
    project, prepare = _C.project_rows, _C.row_projector

    def project_rows(x, p, out, rows, d, k, n_threads):
        widths.append(k)
        project(x, p, out, rows, d, k, n_threads)

    def row_projector(x, p, rows, d, k, rounded):
        run = prepare(x, p, rows, d, k, rounded)
        return lambda *args: (widths.append(k), run(*args))[1]

    monkeypatch.setattr(_C, "project_rows", project_rows)
    monkeypatch.setattr(_C, "row_projector", row_projector)
    return widths


def test_x_is_projected_once(case, made):
    case.check(passes=3)
    assert widths_of(case, made) == case.widths(*TOGETHER)
    case.check()


def test_taps_that_were_taken_off_and_put_on_again(case, made):
    for i in range(3):
        case.taps.detach()
        case.taps.attach()
        assert widths_of(case, made) == case.widths(*(TOGETHER if i else ALONE))
        case.check()


@pytest.mark.parametrize(("path", "learned"), EVERY)
@pytest.mark.parametrize("projection_dtype", [None, torch.bfloat16])
def test_the_same_bits_as_alone(path, learned, projection_dtype):
    case = Case(path, learned, projection_dtype=projection_dtype)
    with case.taps:
        together = [case.rows() for _ in range(3)]
    case.taps = case.capture(shared_inputs=False)
    with case.taps:
        assert all(torch.equal(case.rows(), rows) for rows in together)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared_inputs", [False, None])
def test_not_shared_on_the_cpu_where_it_is_not_asked_for(path, shared_inputs, made):
    case = Case(path, shared_inputs=shared_inputs)
    with case.taps:
        case.check(passes=3)
        assert widths_of(case, made) == case.widths(*ALONE)


@pytest.mark.parametrize("shape", [(N, WIDTH), (N, 2, 3, WIDTH), (N, T + 2, WIDTH)])
def test_other_shapes(case, made, shape):
    case.model.mix = case.model.forward = lambda x: case.model.head(Net.mix(case.model, x))
    case.taps.detach()
    with case.capture(include=["gate", "up", "down", "head"]) as case.taps:
        for shape_now in (shape, (N, T, WIDTH), shape):
            case.x, case.target = torch.randn(shape_now, requires_grad=True), torch.randn(*shape_now[:-1], 5)
            case.check(passes=2)
            assert widths_of(case, made) == case.widths(1, 1, 2)


def test_not_shared_where_the_bits_could_be_others(monkeypatch, made):
    monkeypatch.setattr("logra_kernels.nn.shared_inputs.columns_stand_alone", lambda device: False)
    case = Case("a hook")
    with case.taps:
        case.check(passes=3)
        assert widths_of(case, made) == case.widths(*ALONE)


@pytest.mark.parametrize(("path", "learned"), EVERY)
@pytest.mark.parametrize("projection_dtype", [None, torch.bfloat16])
def test_biases_and_bf16_factors(path, learned, projection_dtype, made):
    case = Case(path, learned, bias=True, projection_dtype=projection_dtype)
    alone = case.capture(shared_inputs=False)
    with case.taps:
        together = [case.rows() for _ in range(3)][-1]
        assert widths_of(case, made) == case.widths(*TOGETHER)
    with alone:
        case.taps = alone
        torch.testing.assert_close(case.rows(), together, rtol=1e-6, atol=1e-6)


def test_weights_and_packed_documents(case, made):
    weights = torch.rand(N, T)

    def weighted(model, x, target):
        part = weights[: len(x)] if len(x) == N else weights[[i for i in range(N) if torch.equal(x[0], case.x[i])]]
        return (((model(x) - target) ** 2).sum(-1) * part).sum()

    for reset in ({"weights": torch.ones(N, T)}, {"offsets": torch.arange(N + 1) * T}):
        begin = case.taps.reset
        case.taps.reset = lambda begin=begin, reset=reset: begin(**reset)
        case.check(weighted, passes=3)
        assert widths_of(case, made, weighted) == case.widths(*TOGETHER)
        case.taps.reset = begin


def test_another_tensor(case, made):
    case.check(passes=2)
    case.model.given = lambda name, x: x.clone() if name == "k" else x
    case.check(passes=3)
    assert widths_of(case, made) == case.widths(1, 1, 1, 1, 2, 2)  # q and v go on together
    case.model.given = lambda name, x: x[..., :] if name in "qv" else x
    case.check(passes=3)
    case.model.given = lambda name, x: x
    case.check(passes=2)


@pytest.mark.parametrize(("path", "learned"), EVERY[:4])  # weights that learn forbid to change x
def test_a_tensor_changed_in_place(path, learned, made):
    case = Case(path, learned)
    with case.taps:
        for changed in (None, "k", "v", "up", None, "q"):

            def instead(name, x, changed=changed):
                group = "qkv" if name in "qkv" else ["gate", "up"]
                return 1.5 * x if changed and changed in group and group.index(name) >= group.index(changed) else x

            case.model.given = lambda name, x, changed=changed: x.mul_(1.5) if name == changed else x
            case.check(passes=2, instead=instead)


def test_another_order(case, made):
    for order in ("qkv", "vqk", "kvq", "qkv"):
        case.model.order = order
        case.check()
    assert widths_of(case, made) == case.widths(*TOGETHER)


def test_a_tap_that_is_not_called(case, made):
    def with_and_without(model, x, target):
        loss = loss_of(model, x, target)
        model.order = "qv"
        loss = loss + loss_of(model, x, target)
        model.order = "qkv"
        return loss

    case.check(passes=2)
    case.check(with_and_without, passes=2 * MOST_FAILURES + 2)
    case.check(passes=3)
    assert widths_of(case, made) == case.widths(1, 1, 1, 1, 1, 1, 2)  # q, k and v have been wrong too often


def test_modules_called_again_and_inside_of_others(case):
    def again(model, x, target):
        return loss_of(model, model.attend(x) + model.q(model.mix(x)), target) + model.k(x).sum()

    case.check(again, passes=4)
    case.check(passes=2)
    case.check(lambda model, x, target: loss_of(model, x, target) + 2 * loss_of(model, x, target), passes=3)


def test_an_exception_in_between(case, made):
    case.check(passes=2)

    def fail(name, x):
        if name == "k":
            raise ArithmeticError
        return x

    for given in (fail, lambda name, x: x):
        case.model.given = given
        if given is fail:
            with pytest.raises(ArithmeticError):
                case.rows()
        else:
            case.check(passes=3)
    assert widths_of(case, made) == case.widths(*TOGETHER)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(case, made, reentrant):
    def checkpointed(model, x, target):
        x = x + checkpoint(model.attend, x, use_reentrant=reentrant)
        x = x + checkpoint(model.mix, x, use_reentrant=reentrant)
        return nn.functional.mse_loss(model.head(x), target, reduction="sum")

    exact = case.rows()
    for _ in range(4):
        torch.testing.assert_close(case.rows(checkpointed), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    inside = (1, 1, 2, 3) * (1 if reentrant else 2)
    assert widths_of(case, made, checkpointed) == case.widths(1, *inside)


def test_two_threads(case):
    """Each thread's q, k and v see its own x, in turns."""
    case.check(passes=2)
    other, losses, turns = torch.randn(N, T, WIDTH, requires_grad=True), {}, threading.Barrier(2)

    def given(name, x):
        turns.wait()
        return x

    def forward(x):
        losses[id(x)] = loss_of(case.model, x, case.target)

    case.taps.reset(N)
    case.model.given = given
    threads = [threading.Thread(target=forward, args=(x,)) for x in (case.x, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    case.model.given = lambda name, x: x
    for loss in losses.values():
        loss.backward()
    got = case.taps.rows()
    exact = case.rows(lambda model, x, target: loss_of(model, x, target) + loss_of(model, other, target))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    case.check(passes=2)


def test_compiled(case):
    case.check(passes=2)
    exact = case.rows()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        case.taps.reset(N)
        loss_of(compiled, case.x, case.target).backward()
        torch.testing.assert_close(case.taps.rows(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    case.check()


def test_the_same_factors_are_met_once_in_a_compiled_graph(made):
    case = Case("in the graph", learned=True)
    with case.capture(shared_inputs=False) as case.taps:
        exact = case.rows()
        compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager_decomp_partition")
        for _ in range(2):
            made.clear()
            case.taps.reset(N)
            loss_of(compiled, case.x, case.target).backward()
            assert sorted(made) == case.widths(*TOGETHER)
            torch.testing.assert_close(case.taps.rows(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_passes_without_gradients_and_without_taps(case, made):
    for between in range(4):
        case.check()
        case.taps.active = between != 1
        with torch.set_grad_enabled(between == 1):
            case.model(case.x)
        case.taps.active = True
    assert widths_of(case, made) == case.widths(*TOGETHER)

    def switch(name, x):
        case.taps.active = name != "k"
        return x

    case.model.given = switch
    case.model(case.x)
    case.taps.active, case.model.given = True, lambda name, x: x
    case.check(passes=3)


def test_other_dtypes(case):
    def autocast(model, x, target):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        return nn.functional.mse_loss(y.float(), target, reduction="sum")

    case.check(passes=2)
    case.check(autocast, passes=2, rtol=5e-2)
    case.check(passes=2)
    case.model.double()
    case.x, case.target = case.x.detach().double().requires_grad_(), case.target.double()
    case.check(passes=3)
    case.model.float()
    case.x, case.target = case.x.detach().float().requires_grad_(), case.target.float()
    case.check(passes=3)


def test_other_factors(case, made):
    for seed in range(3):
        case.taps.project(lk.Projection(rank=RANK, seed=seed))
        case.check(passes=2)
        assert widths_of(case, made) == case.widths(*(ALONE if case.learned else TOGETHER))
        if case.learned:
            case.taps.project(case.projection)
            case.check(passes=2)
            assert widths_of(case, made) == case.widths(*TOGETHER)


def test_one_weight_under_two_names(made):
    for path in PATHS:
        case = Case(path)
        case.model.up.weight = case.model.gate.weight
        case.taps = lk.capture(case.model, SMALL, in_graph=case.taps.in_graph, shared_inputs=True)
        with case.taps:
            case.check(passes=3)
            assert widths_of(case, made) == case.widths(1, 1, 1, 1, 3)  # gate and up have one factor


def test_few_columns_are_projected_alone_for_the_sake_of_their_bits(made):
    case = Case("a hook")
    with lk.capture(case.model, lk.Projection(rank=8), shared_inputs=True) as case.taps:
        case.check(passes=3)
        assert widths_of(case, made) == [8] * 8


def test_copies_find_out_by_themselves(case):
    case.check(passes=2)
    for copied in (copy.deepcopy(case.taps.shared), pickle.loads(pickle.dumps(case.taps.shared))):
        assert isinstance(copied, SharedInputs)
        assert copied.on_cpu == (not case.learned)
        assert case.taps.shared._groups
        assert not copied._groups


def test_lora_adapters_and_their_base_layers(made):
    peft = pytest.importorskip("peft")
    case = Case("in the graph")
    targets = ["q", "k", "v", "gate", "up"]
    config = peft.LoraConfig(r=RANK, lora_dropout=0.0, target_modules=targets, init_lora_weights=False)
    case.model = peft.get_peft_model(case.model, config).base_model.model
    with lk.capture(case.model, SMALL, in_graph=True, shared_inputs=True) as case.taps:
        case.check(passes=3)
        # beside the second matrices of the adapters: three layers alone, and groups with the adapters' first matrices
        assert widths_of(case, made) == [RANK] * (len(targets) + 3) + [4 * RANK, 6 * RANK]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    case = Case("in the graph")
    case.model.cuda()
    case.x, case.target = case.x.detach().cuda().requires_grad_(), case.target.cuda()
    with lk.capture(case.model, SMALL, shared_inputs=False) as case.taps:
        alone = case.rows()
    with lk.capture(case.model, SMALL) as case.taps:
        assert all(torch.equal(case.rows(), alone) for _ in range(3))
        assert case.taps.shared._groups
        case.check(passes=3, rtol=1e-3)
        side = torch.cuda.Stream()

        def given(name, x):
            torch.cuda.synchronize()
            torch.cuda.set_stream(side if name == "k" else torch.cuda.default_stream())
            return x

        case.model.given = given
        case.check(passes=2, rtol=1e-3)
