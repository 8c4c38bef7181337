"""capture(model): taps on the chosen layers, and the projected gradients they gather."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from logra_kernels.errors import LograError
from logra_kernels.nn.adapters import DEFAULT_KINDS, Adapter, AttentionAdapter, ExpertAdapter, ReplacedForward
from logra_kernels.nn.attention import TappedAttention
from logra_kernels.nn.covariance import Covariances
from logra_kernels.nn.direct import LinearHook
from logra_kernels.nn.experts import TappedExperts
from logra_kernels.nn.hook import Hook
from logra_kernels.nn.layers import Layer, find_layers
from logra_kernels.nn.outside import Watch, anything_compiled
from logra_kernels.nn.probe import Held, Probe
from logra_kernels.nn.shapes import let_shapes_vary
from logra_kernels.nn.shared_inputs import SharedInputs
from logra_kernels.nn.state import TapState
from logra_kernels.nn.tap import check_heard
from logra_kernels.nn.tokens import TokenShares
from logra_kernels.nn.untapped import warn_of_untapped, without_fused_layers
from logra_kernels.projection import Projection

# what is tapped inside of its module's forward
_REPLACED: dict[type[Adapter], Callable[..., ReplacedForward]] = {
    AttentionAdapter: TappedAttention,
    ExpertAdapter: TappedExperts,
}


def _check_offsets(offsets: Tensor, batch_size: int | None) -> tuple[int, int]:
    """(number of documents, number of positions).

    Raises:
        ValueError: Not [N+1] integers from 0 on that never decrease, or another N than `batch_size`.
    """
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"capture: offsets {tuple(offsets.shape)} {offsets.dtype} must be [N+1] int64")
    cuts = offsets.tolist()
    if cuts[0] != 0:
        raise ValueError(f"capture: offsets begin at {cuts[0]}; they must begin at 0")
    bad = next((n for n in range(len(cuts) - 1) if cuts[n + 1] < cuts[n]), None)
    if bad is not None:
        raise ValueError(f"capture: offsets decrease from {cuts[bad]} to {cuts[bad + 1]} at document {bad}")
    documents = len(cuts) - 1
    if batch_size not in (None, documents):
        raise ValueError(f"capture: offsets cut {documents} documents where {batch_size} samples were begun")
    return documents, cuts[-1]


class Taps(TapState):
    """Taps on a model's layers. Made by `capture`; the gradients stay readable after the taps are gone.

    Gradients add up over forward passes, as `.grad` does, until `reset`.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        layers: Sequence[Layer],
        projection_dtype: torch.dtype | None,
        in_graph: bool,
        shared_inputs: bool | None = None,
    ) -> None:
        super().__init__(in_graph, None if shared_inputs is False else SharedInputs(on_cpu=shared_inputs is True))
        self._model, self._layers = model, layers
        self._probes = {layer.name: Probe(layer, projection_dtype) for layer in layers}
        self._project(projection)
        self.sequence_first = any(adapter.samples_at for layer in layers for _, adapter in layer.holders)
        self._hooks: dict[tuple[str, nn.Module], Hook] = {}
        self._handles: list = []
        self._context: AbstractContextManager | None = None
        self._watch: Watch | None = None
        self._watched = False

    def attach(self) -> None:
        """Put the hooks on. They do nothing until `active` is set. Attach before torch.compile traces the model."""
        inside: dict[tuple[Callable[..., ReplacedForward], nn.Module], dict[str, Hook]] = {}
        for layer in self._layers:
            for module, adapter in layer.holders:
                parameters = adapter.parameters(module)
                plain = type(module) is nn.Linear and adapter.known and len(parameters) == 1
                plain = plain and not self.sequence_first
                hook = self._hook(LinearHook if plain else Hook, layer.name, module, adapter)
                if replaced := _REPLACED.get(type(adapter)):
                    inside.setdefault((replaced, module), {})[adapter.part] = hook
                else:
                    # before other hooks, which may change y; but tensor parallel ones make the whole of it first
                    first = not hasattr(parameters[0], "device_mesh")
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))
        self._handles += [replaced(module, hooks, self) for (replaced, module), hooks in inside.items()]

    def _hook(self, kind: type[Hook], name: str, module: nn.Module, adapter: Adapter) -> Hook:
        """One from an earlier time the hooks were on, which keeps what it has prepared, or a new one."""
        hook = self._hooks.get((name, module))
        if type(hook) is kind:
            hook.renew()
            return hook
        self._hooks[name, module] = made = kind(name, adapter, self._probes[name], self)
        return made

    def detach(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def project(self, projection: Projection) -> None:
        """Go on with other factors. Do so before torch.compile traces the model.

        Raises:
            LograError: `projection` is still to be learned.
        """
        self._project(projection)
        if self.shared is not None:
            self.shared.forget()
        self.reset()

    def _project(self, projection: Projection) -> None:
        self.projection = projection
        held: Held = {}
        for layer in self._layers:
            self._probes[layer.name].project(layer, projection, held)
        sources = Counter(id(probe.source) for probe in self._probes.values() if probe.source is not None)
        for probe in self._probes.values():
            probe.shares = sources[id(probe.source)] > 1

    def reset(
        self,
        batch_size: int | None = None,
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
        sequence_length: int | str | None = None,
    ) -> None:
        """Begin a new batch.

        Args:
            batch_size: N. Needed beforehand only where torch.compile traces the model; else the first forward tells.
            weights: A factor for each position, [N, T] (a padding mask, say); positions of weight 0 are left out.
                Of bool, layers that see one position a sample (behind a pooling) are left as they are.
            offsets: Where token rows [B, T] are packed with documents: [N+1] int64 (cu_seqlens), document n being the
                positions offsets[n] .. offsets[n+1]-1 of the B * T flattened ones, of which every one belongs to a
                document (padding to the one before it, with weight 0 where the loss does not leave it out already).
                Each document is then a sample, an empty one with a gradient of zero; weights are [B, T].
            sequence_length: T, where a model gives some layers the rows of all samples as [N * T, d] (OPT, the shared
                experts of Qwen's mixtures); without it such a layer is refused. N is batch_size or the weights'.
                "any", where a model cuts samples into windows, [N * W, T, d] with another W in each layer (Swin,
                MobileViT): a layer's rows may be any multiple of N, each sample's one after the other, which
                `Run.verify` checks.

        Raises:
            ValueError: `offsets` are not such, or another number of samples than batch_size; `sequence_length` without
                a number of samples or beside `offsets`, which say as much.
        """
        if isinstance(sequence_length, str) and sequence_length != "any":
            raise ValueError(f"capture: sequence_length is {sequence_length!r}; it must be a number or 'any'")
        if isinstance(sequence_length, int) or (sequence_length is not None and offsets is not None):
            batch_size = len(weights) if batch_size is None and weights is not None else batch_size
            if batch_size is None or offsets is not None:
                beside = "without batch_size or weights" if offsets is None else "beside offsets"
                raise ValueError(f"capture: sequence_length {sequence_length} {beside}")
        positions = None
        if offsets is not None:
            batch_size, positions = _check_offsets(offsets, batch_size)
        elif isinstance(sequence_length, int):
            assert batch_size is not None
            positions = batch_size * sequence_length
        self.weights, self.offsets, self.samples = weights, offsets, batch_size
        self.extent = None if positions is None else torch.zeros((), dtype=torch.bool, device="cpu").expand(positions)
        self.any_length, self.begun_by = sequence_length == "any", None
        if self._watch is not None and self._watch.seen:
            self._watch.rest()
        let_shapes_vary(self, batch_size is not None)
        for probe in self._probes.values():
            probe.leaf = None
            if batch_size is not None:
                probe.renew(batch_size)

    @contextmanager
    def tokens(self, rows: Tensor) -> Iterator[TokenShares]:
        """Gather, instead of gradients, each position's part of <row, gradient>; eager models only.

        Args:
            rows: What the samples' gradients are multiplied with, [Q, D] in `rows()`'s order: preconditioned queries.

        Raises:
            ValueError: `rows` does not fit the layers, or a layer's positions are not the [N, T] of the others.
        """
        self.mode = shares = TokenShares(self.layers, rows)
        try:
            yield shares
        finally:
            self.mode = None

    @contextmanager
    def covariances(
        self,
        into: Covariances | None = None,
        whole: Collection[str] = (),
        sharing: str = "expand",
        rank: int = 64,
        *,
        beside: bool = False,
    ) -> Iterator[Covariances]:
        """Gather, instead of gradients, the covariances over positions (for KFAC and PCA); eager models only.

        Args:
            into: Earlier ones to go on adding to; the next three arguments are then theirs.
            whole: The sides, of "in" and "out", that are not projected.
            sharing: How positions count that share a weight, "expand" or "reduce".
            rank: How many of their leading directions will be wanted.
            beside: Gather the gradients as well.
        """
        self.mode = covariances = into or Covariances(self.layers, whole, sharing, rank)
        self.beside = beside
        try:
            yield covariances
        finally:
            self.mode, self.beside = None, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise LograError in a backward by a tapped weight that the model uses outside of its layers.

        In a first batch only, since it costs Python's time on every torch function. Layers of PyTorch's transformers
        are called one by one meanwhile, for a fused call of frozen ones would pass the taps by.
        """
        with without_fused_layers(self._model), self._watching():
            yield

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self._watched or anything_compiled():
            yield
            return
        self._watch = watch = Watch(self._model, self._layers)
        try:
            yield
        finally:
            watch.close()
            self._watch = None
        self._watched = True

    def __enter__(self) -> "Taps":
        self.attach()
        self.active = True
        self._context = self.watched()
        self._context.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self.active = False
        let_shapes_vary(self, False)
        self.detach()
        assert self._context is not None
        self._context.__exit__(*exc)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (k_out, k_in), in the model's order."""
        return {name: probe.k for name, probe in self._probes.items()}

    @property
    def factors(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Layer name -> (p_in [k_in, d_in], p_out [k_out, d_out]); None stands for the identity."""
        return {name: (probe.p_in, probe.p_out) for name, probe in self._probes.items()}

    @property
    def factor_dtypes(self) -> dict[str, torch.dtype]:
        """Layer name -> dtype of the numbers that its factors are held for."""
        return {name: probe.factor_dtype for name, probe in self._probes.items()}

    @property
    def holders(self) -> dict[str, tuple[tuple[nn.Module, Adapter], ...]]:
        """Layer name -> the modules that hold its weight (several where it is tied), with their adapters."""
        return {layer.name: layer.holders for layer in self._layers}

    @property
    def probes(self) -> dict[str, Tensor]:
        """Layer name -> the zero leaf [N, k_out, k_in] whose gradient is the projected one, for `autograd.grad`.

        Raises:
            LograError: The taps were made without `in_graph`.
        """
        if not self.in_graph:
            raise LograError("capture: probes are in autograd's graph only with capture(..., in_graph=True)")
        return {name: probe.leaf for name, probe in self._probes.items() if probe.leaf is not None}

    @property
    def grads(self) -> dict[str, Tensor]:
        """Layer name -> projected gradient of each sample, [N, k_out, k_in], fp32 (fp64 for an fp64 model).

        Raises:
            LograError: A layer received no gradient since the last reset.
        """
        found = {name: probe.leaf.grad for name, probe in self._probes.items() if probe.leaf is not None}
        heard = {name: grad for name, grad in found.items() if grad is not None}
        advice = (
            "run forward and backward under the taps, compile the model after the taps are on, checkpoint with"
            " use_reentrant=False, and exclude layers that the loss does not reach or that the model does not call,"
            " as it uses their weights itself"
        )
        check_heard("capture", self._probes, heard, advice)
        return heard

    def rows(self) -> Tensor:
        """All layers' gradients side by side, [N, D]: one stored row a sample; on the first layer's device."""
        grads = list(self.grads.values())
        return torch.cat([grad.flatten(1).to(grads[0].device) for grad in grads], dim=1)


def capture(
    model: nn.Module,
    projection: Projection | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    bias: bool = False,
    projection_dtype: torch.dtype | None = None,
    in_graph: bool = False,
    shared_inputs: bool | None = None,
) -> Taps:
    """Tap a model's layers: inside the `with`, each sample's projected gradient ends in `taps.grads`.

    The layers, the loss and the weights' own gradients are untouched; weights may be frozen. The loss must be a sum
    over samples (a batch mean would divide every gradient by the batch size). A weight that is computed from others (a
    parametrization, weight norm, a pruning mask) counts as the layer multiplies with it. Of a weight that is tied to a
    module's that is not tapped (a head's to its embedding's, without kind "embedding"), rows hold the part of the
    gradient that goes by the tapped one. Weights of modules of other kinds, as LSTMs' or PEFT's vectors, have no part
    in the rows; without `include`, a warning names those of PyTorch's own modules.

    The projections of nn.MultiheadAttention are layers "<module>.in_proj" ([3 E, E], as its parameter; or "q_proj",
    "k_proj", "v_proj" where kdim or vdim are given) and "<module>.out_proj", with the samples where batch_first says.

    Args:
        model: Any module; its inputs must hold the samples in dimension 0 of every tapped layer, unless
            `Taps.reset` says where they lie (packed documents, flattened positions), or PyTorch's own transformer
            layers and attention do (batch_first=False).
        projection: Kind, rank and seed of the factors; default `Projection()`.
        include: Glob patterns on layer names ("*.mlp.*"); default every layer of the kinds.
        exclude: Glob patterns taken away from these.
        kinds: "linear" (nn.Linear, Hugging Face's Conv1D, nn.MultiheadAttention's projections) and "conv" (1, 2 and 3
            dimensions) by default; "embedding", "norm" (gains of LayerNorm and RMSNorm) and "expert" (each expert of
            transformers' fused mixtures, as layers "<module>.gate_up_proj.<e>" and "<module>.down_proj.<e>") on
            request.
        bias: Give linear layers that have a bias one more input column that holds its gradient.
        projection_dtype: What linear layers' activations and gradients are multiplied with the factors in; sums are in
            fp32 all the same. None is the model's own dtype; bf16 rounds those of an fp32 model, which halves the cost
            where bf16 is the faster, and adds to a row an error of some 0.4 % of its norm, as torch's bf16 products do;
            fp32 keeps the factors of a 16-bit model exact. An fp64 model keeps fp64. Factors that a `Run` learns for 16
            bits are rounded as they are learned, and stay so for a model of 32.
        in_graph: Make every tap a node of autograd's graph, so that `torch.autograd.grad(loss, taps.probes.values())`
            works. Without it, eager models on the CPU are tapped more cheaply where a layer's output gets a gradient
            anyway, and `backward()` is what gathers.
        shared_inputs: Project a tensor that several linear layers are given, as q, k and v or gate and up are, once by
            all their factors; which layers are is seen in the first batches. None does so where it pays: on GPUs, and
            wherever the factors are the same, as those that PCA learned from one tensor. True does so for unlike
            factors on the CPU as well, where it pays for wide inputs and few columns alone. There, layers whose
            weights learn keep x itself without `in_graph`, and project it in the backward, each for itself.

    Raises:
        ValueError: An unknown kind, a pattern that matches no layer, or another dtype than bf16 and fp32.
    """
    if projection_dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(f"capture: projection_dtype is {projection_dtype}; it must be torch.bfloat16 or torch.float32")
    layers = find_layers(model, include, exclude, kinds, bias)
    if include is None:
        warn_of_untapped(model, kinds)
    return Taps(model, projection or Projection(), layers, projection_dtype, in_graph, shared_inputs)
