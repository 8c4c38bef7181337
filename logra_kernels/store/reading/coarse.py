"""Two-stage search: short rows that fit in memory name a shortlist, whose rows alone are read and scored exactly.

Short rows are y_j = sum of s_i g_i over the i of group j: the D numbers of a row with random signs s, dealt out at
random to m equal groups, and rounded to any format of `RowFormat`. E[y(q) . y(g)] = q . g, with a standard error of
about |q| |g| / sqrt(m) (sparse Johnson-Lindenstrauss, Kane and Nelson 2014, with one nonzero a column). How well that
ranks depends on how far the best rows stand out, so the recall is measured and kept with the index.

The index is a sidecar of the rows' `content_hash`, so it is never used for other rows. It keeps a checksum of every
row: of a shard that was not verified as a whole, a shortlisted row is.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.ops import EncodedRows, RowFormat, quantize_rows, score_topk
from logra_kernels.store.durable import digest
from logra_kernels.store.encoding import decode, row_sums
from logra_kernels.store.facts import Facts
from logra_kernels.store.format import SIDECARS
from logra_kernels.store.reading.reader import Reader
from logra_kernels.store.reading.stored import StoredRows
from logra_kernels.store.tensorfile import as_bytes

SIDECAR = "index"
DIMS, LEAST_FACTOR = 2048, 4  # numbers in a short row, unless that is more than a quarter of the row
TARGET = 0.99
TOP = 100  # rows at the top that measurements look at, unless that is more than a tenth of the store
SAMPLES = 32  # stored rows that ask, where no queries are given
_BYTES = 64 << 20  # of rows or scores at work at a time


@dataclass(frozen=True)
class IndexInfo:
    """What an index is and how well it finds.

    Attributes:
        dims: Numbers in a short row.
        dtype: Their format.
        seed: Of signs and groups.
        k: The recall is of the k best rows; by default 100, or a tenth of the rows where that is fewer.
        recall: Shortlist's length -> share of the exact k best that were found, mean over the queries.
        shortlist: The length used unless told otherwise: the shortest with a recall of `TARGET`, or the longest.
        queries: How many asked.
    """

    dims: int
    dtype: str
    seed: int
    k: int
    recall: dict[int, float]
    shortlist: int
    queries: int


class CoarseIndex:
    """The short rows of a store, in memory."""

    def __init__(self, info: IndexInfo, rows: EncodedRows, sums: Tensor, spread: "Spread"):
        self.info = info
        self.sums = sums  # xxh3_64 of every stored row, [N] int64
        self._rows = rows
        self._spread = spread

    def shortlist(self, queries: Tensor, length: int, row_scale: Tensor | None, largest: bool) -> Tensor:
        """Row numbers that the short rows rank first, [Q, min(length, N)]."""
        short = self._spread(queries.float().cpu())
        scale = None if row_scale is None else row_scale.float().cpu()
        return score_topk(short, self._rows, length, scale, largest=largest)[1]


class Spread:
    """y_j = sum of s_i x_i over group j: rows [n, D] of the CPU to [n, m] fp32."""

    def __init__(self, dim: int, dims: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self._size = -(-dim // dims)  # of a group; the last places of some are empty
        self._order = torch.randperm(dims * self._size, generator=draw, device="cpu")
        self._signs = (torch.randint(2, (dim,), generator=draw, device="cpu") * 2 - 1).float()
        self._dims, self._dim = dims, dim
        self.digest = digest(as_bytes(self._order), as_bytes(self._signs))

    def __call__(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(len(rows), self._dims * self._size, dtype=torch.float32)
        padded[:, : self._dim] = rows * self._signs
        return padded[:, self._order].view(len(rows), self._dims, self._size).sum(2)


def measured_top(rows: int) -> int:
    """k of a measurement of the k best of so many rows: min(100, rows / 10), at least 1. All rows are always found."""
    return min(TOP, max(1, rows // 10))


def build(
    store: StoredRows,
    dims: int | None,
    dtype: str,
    seed: int,
    k: int | None,
    queries: Tensor | None,
    row_scale: Tensor | None,
) -> IndexInfo:
    """One pass over the rows for the index, one for the exact answer that its recall is measured against.

    Raises:
        StoreError: An argument is wrong, or the store has no rows.
    """
    if len(store) == 0:
        raise StoreError(f"{store.path} has no rows to build an index over; log some first")
    dims = max(1, min(DIMS, store.dim // LEAST_FACTOR)) if dims is None else dims
    k = measured_top(len(store)) if k is None else min(k, len(store))
    if k < 1 or not 1 <= dims <= store.dim:
        raise StoreError(f"index: dims is {dims} and k {k}; dims must be from 1 to {store.dim}, k at least 1")
    try:
        form = RowFormat.of(dtype)
    except ValueError as error:
        raise StoreError(f"index: {error}") from None
    spread = Spread(store.dim, dims, seed)
    rows, sums = _short_rows(store, spread, form, dims)
    if queries is None:
        chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed), device="cpu")[:SAMPLES]
        queries = torch.cat([store.read(row, row + 1) for row in chosen.sort().values.tolist()])
    draft = CoarseIndex(IndexInfo(dims, dtype, seed, k, {}, k, len(queries)), rows, sums, spread)
    recall = _recall(store, draft, queries, k, row_scale)
    good = [length for length, share in recall.items() if share >= TARGET]
    info = IndexInfo(dims, dtype, seed, k, recall, min(good, default=max(recall)), len(queries))
    tensors = {"codes": rows.codes, "sums": sums} | ({} if rows.scales is None else {"scales": rows.scales})
    store.sidecar_write(SIDECAR, tensors, asdict(info) | {"generator": spread.digest})
    return info


def load(store: Facts) -> CoarseIndex:
    """
    Raises:
        StoreError: There is none for the rows as they are, it is damaged, or this torch draws other random numbers.
    """
    kept = store.sidecar_read(SIDECAR)
    if kept is None:
        older = any((store.path / SIDECARS).glob(f"{SIDECAR}.*.safetensors"))
        state = "was built over other rows than it has now" if older else "was not built"
        raise StoreError(f"the search index of {store.path} {state}; call store.build_index(), or `logra index`")
    tensors, facts = kept
    spread = Spread(store.dim, facts["dims"], facts["seed"])
    if spread.digest != facts["generator"]:
        raise StoreError(f"the search index of {store.path} was built with another random generator; build it again")
    form = RowFormat.of(facts["dtype"])
    rows = EncodedRows(form, facts["dims"], tensors["codes"], tensors.get("scales"))
    recall = {int(length): share for length, share in facts["recall"].items()}
    info = IndexInfo(**{name: facts[name] for name in IndexInfo.__dataclass_fields__} | {"recall": recall})
    return CoarseIndex(info, rows, tensors["sums"], spread)


def search(
    reader: Reader,
    index: CoarseIndex,
    queries: Tensor,
    k: int,
    row_scale: Tensor | None,
    largest: bool,
    shortlist: int | None,
) -> tuple[Tensor, Tensor]:
    """`Reader.topk` among the shortlists of all queries; the exact one where they make up half of the store."""
    queries, row_scale = reader.check(queries, row_scale)
    if k < 1 or (shortlist is not None and shortlist < 1):
        raise StoreError(f"k is {k} and the shortlist {shortlist}; both must be at least 1")
    length = max(k, index.info.shortlist if shortlist is None else shortlist)
    rows = index.shortlist(queries, length, row_scale, largest).unique()
    if 2 * len(rows) > reader.manifest.rows:
        return reader.topk(queries, k, row_scale, largest)
    return reader.topk_among(rows, index.sums, queries, k, row_scale, largest)


def _short_rows(store: StoredRows, spread: Spread, form: RowFormat, dims: int) -> tuple[EncodedRows, Tensor]:
    codes = torch.empty(len(store), form.code_width(dims), dtype=form.code_dtype, device="cpu")
    scales = (
        torch.empty(len(store), form.scale_width(dims), dtype=form.scale_dtype, device="cpu") if form.scaled else None
    )
    sums = torch.empty(len(store), dtype=torch.int64, device="cpu")
    stored = store.manifest.row_bytes
    for start, block in store.encoded_blocks(_BYTES * stored // max(stored, 4 * store.dim)):
        part = slice(start, start + len(block))
        sums[part] = row_sums(block)
        short = spread(decode(store.manifest, block).float())
        if scales is None:
            codes[part] = short.to(form.code_dtype)
            continue
        encoded = quantize_rows(short, form)
        assert encoded.scales is not None
        codes[part], scales[part] = encoded.codes, encoded.scales
    return EncodedRows(form, dims, codes, scales), sums


def _recall(
    store: StoredRows, index: CoarseIndex, queries: Tensor, k: int, row_scale: Tensor | None
) -> dict[int, float]:
    """Share of the exact k best among shortlists of k, 2k, 4k, ... rows, up to a quarter of the store."""
    exact = store.topk(queries, k, row_scale)[1].cpu()
    most = min(len(store), max(k, len(store) // 4))
    found = index.shortlist(queries, most, row_scale, largest=True)
    place = torch.full((len(queries), len(store)), most, device="cpu")
    place.scatter_(1, found, torch.arange(most, device="cpu").expand_as(found))
    places = place.gather(1, exact)
    lengths = [most]
    length = k
    while length < most:
        lengths.append(length)
        length *= 2
    return {length: float((places < length).double().mean()) for length in sorted(lengths)}
