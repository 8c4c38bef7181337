"""A model whose layers share inputs, its taps on every path, and what they have projected."""

from functools import partial
from itertools import product

import torch
from oracle import assert_equal_rows, projected_autograd
from torch import Tensor, nn

import logra_kernels as lk

RANK = 12  # enough for C++ to sum in the same order however many factors are stacked
SMALL = lk.Projection(rank=RANK)
N, T, WIDTH = 3, 7, 16
TOGETHER = 1, 1, 1, 2, 3  # how many taps a projection of a pass is for: gate and up, and q, k and v
ALONE = (1,) * 8


class Net(nn.Module):
    """Attention and a gated MLP.

    Attributes:
        order: Which of q, k and v are called, in this order.
        given: (name, x) -> what a layer is given in the place of the x of its group.
    """

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 24, bias=bias) for _ in range(2))
        self.down, self.head = nn.Linear(24, WIDTH, bias=bias), nn.Linear(WIDTH, 5)
        self.order = "qkv"
        self.given = lambda name, x: x

    def attend(self, x: Tensor) -> Tensor:
        x = 0.5 * x
        y = {name: getattr(self, name)(self.given(name, x)) for name in self.order}
        return self.o(torch.softmax(y["q"] @ y.get("k", y["q"]).mT, -1) @ y.get("v", y["q"]))

    def mix(self, x: Tensor) -> Tensor:
        x = 0.5 * x
        return self.down(torch.sigmoid(self.gate(self.given("gate", x))) * self.up(self.given("up", x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return self.head(x + self.mix(x))


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


class Case:
    """A model, a batch and its taps.

    Args:
        path: One of `PATHS`.
        learned: Factors are PCA's of this batch, so that taps which share an input have the same, and share it without
            being told to; else unlike ones that are stacked.
    """

    def __init__(self, path: str, learned: bool = False, **settings) -> None:
        self.frozen = path != "learning, in the graph"
        self.model = Net(bias=settings.get("bias", False)).requires_grad_(not self.frozen)
        self.x, self.target = torch.randn(N, T, WIDTH, requires_grad=True), torch.randn(N, T, 5)
        self.settings = {"in_graph": path != "a hook", "shared_inputs": None if learned else True, **settings}
        self.learned = learned
        self.projection = self.learn() if learned else SMALL
        self.taps = self.capture()

    def capture(self, **settings) -> lk.Taps:
        return lk.capture(self.model, self.projection, **{**self.settings, **settings})

    def learn(self) -> lk.Projection:
        """The projection that this batch teaches."""
        bias = self.settings.get("bias", False)
        with lk.capture(self.model, SMALL, bias=bias) as taps, taps.covariances(whole=("in", "out"), rank=RANK) as seen:
            loss_of(self.model, self.x, self.target).backward()
        self.x.grad = None
        self.model.zero_grad()
        return lk.Projection(RANK, "pca").learn(seen.spectra())

    def widths(self, *taps: int) -> list[int]:
        """Those of projections for so many taps each."""
        return sorted(RANK * (1 if self.learned else n) for n in taps)

    def rows(self, loss=loss_of) -> Tensor:
        self.taps.reset()
        loss(self.model, self.x, self.target).backward()
        return self.taps.rows()

    def check(self, loss=loss_of, passes: int = 1, rtol: float = 1e-5, instead=None) -> None:
        """Against one-sample autograd of the untapped model, its layers given what `instead` says."""
        for _ in range(passes):
            self.rows(loss)
            got = self.taps.grads
            given = self.model.given
            self.taps.active, self.model.given = False, instead or given
            exact = projected_autograd(self.model, self.taps, [partial(self.loss_of_one, loss, i) for i in range(N)])
            self.taps.active, self.model.given = True, given
            assert_equal_rows(got, exact, rtol)

    def loss_of_one(self, loss, i: int) -> Tensor:
        return loss(self.model, self.x.detach()[i : i + 1], self.target[i : i + 1])


PATHS = ["a hook", "in the graph", "learning, in the graph"]


EVERY = list(product(PATHS, (False, True)))


def name_of(param: tuple[str, bool]) -> str:
    path, learned = param
    return f"{path}, {'the same factors' if learned else 'stacked'}"


def tapped(request):
    """A case on the path that is the parameter; for `pytest.fixture(params=EVERY)`."""
    made = Case(*request.param)
    with made.taps:
        yield made


def widths_of(case, made, loss=loss_of) -> list[int]:
    made.clear()
    case.rows(loss)
    return sorted(made)
