"""Rows in every format: what is read back, scored and kept, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree, write

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.ops import FORMATS
from logra_kernels.store import GradientStore, durable

SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
WIDE = {"first": (9, 11), "h.0.mlp": (8, 6)}  # 147 numbers: two blocks and an odd end


@pytest.fixture(params=FORMATS)
def name(request):
    return request.param


def wide_store(path, name, count=21, **options):
    rows = rows_of(count, dim=147)
    with GradientStore.create(path, WIDE, name, rows_per_shard=8, **options) as store:
        store.append(rows, ids_of(count))
    return GradientStore.open(path), rows


def decoded(rows, name, **options):
    """What the format keeps of the rows."""
    form = lk.RowFormat.of(name, **options)
    return lk.dequantize_rows(lk.quantize_rows(rows, form))


def test_rows_come_back_as_the_format_keeps_them(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    kept = decoded(rows, name)
    assert store.dtype == name
    assert torch.equal(store.read(3, 19), kept[3:19])
    blocks = list(store.blocks(max_bytes=1500))
    assert len(blocks) > 3
    assert all(rows.dtype == store.manifest.torch_dtype for _, rows in blocks)
    assert torch.equal(torch.cat([rows for _, rows in blocks]).float(), kept)
    assert torch.equal(torch.cat([decoded_block(rows) for _, rows in store.encoded_blocks()]), kept)


def decoded_block(rows):
    return lk.dequantize_rows(rows)


def test_scores_and_topk_are_those_of_the_decoded_rows(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    queries, scale = rows_of(5, seed=1, dim=147), torch.rand(21) + 0.5
    exact = queries.double() @ decoded(rows, name).double().T * scale
    finest = {"query_format": "fp32"} if name in SCALED else {}
    torch.testing.assert_close(store.score(queries, scale, **finest).double(), exact, rtol=1e-5, atol=1e-5)
    values, index = store.topk(queries, 4, scale, max_bytes=500, **finest)
    best = exact.topk(4)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(values.double(), best.values, rtol=1e-5, atol=1e-5)
    for found in (store.score(queries, scale), store.topk(queries, 4, scale, max_bytes=500)[0]):
        torch.testing.assert_close(found.double(), exact if found.shape[1] > 4 else best.values, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("name", SCALED)
def test_queries_of_half_precision_are_taken_as_they_are(tmp_path, name):
    store, rows = wide_store(tmp_path / "s", name)
    queries = rows_of(12, seed=1, dim=147).bfloat16()
    exact = queries.double() @ decoded(rows, name).double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(store.topk(queries, 1)[0].double(), exact.amax(1, keepdim=True), rtol=1e-3, atol=2e-3)


def test_equal_rows_make_equal_bytes_however_they_are_appended(tmp_path, name):
    whole = write(tmp_path / "whole", 20, name)
    with GradientStore.create(tmp_path / "parts", LAYERS, name, rows_per_shard=8) as store:
        store.append(*part_of(20, 0, 5))
        store.flush()
    for start, stop in ((5, 6), (6, 15), (15, 20)):  # each opens a short tail and writes it again
        with GradientStore.open(tmp_path / "parts", mode="append") as store:
            store.append(*part_of(20, start, stop))
    assert tree(tmp_path / "parts") == tree(whole)


@pytest.mark.parametrize("options", [{"block": 64}, {"scale": "fp16"}, {"block": 1024, "scale": "fp16"}])
def test_the_manifest_names_block_and_scale(tmp_path, options):
    store, rows = wide_store(tmp_path / "s", "int8", **options)
    assert store.format == lk.RowFormat.of("int8", **options)
    assert torch.equal(store.read(0, 21), decoded(rows, "int8", **options))
    with safe_open(tmp_path / "s" / store.manifest.shards[0].names[0], "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
            "rows": [8, 147],
            "scales": [8, store.format.scale_width(147)],
        }


def test_bytes_on_disk_are_those_of_the_format(tmp_path, name):
    store, _ = wide_store(tmp_path / "s", name)
    form = store.format
    for shard in store.manifest.shards:
        assert 0 <= shard.rows.nbytes - (shard.stop - shard.start) * form.row_bytes(147) < 512


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_id(tmp_path, name, bad):
    rows = rows_of(6)
    rows[4, 9] = bad
    with GradientStore.create(tmp_path / "s", LAYERS, name) as store:
        with pytest.raises(StoreError, match=r"1 rows hold NaN or Inf: ids 'row-4', layers h\.0\.mlp"):
            store.append(rows, ids_of(6), columns_of(6))
        store.append(rows[:4], ids_of(4))
    assert len(store) == 4


def test_what_fp16_cannot_hold_is_refused(tmp_path):
    rows = rows_of(3)
    rows[1] *= 1e8
    half = GradientStore.create(tmp_path / "a", LAYERS, "fp16")
    with half, pytest.raises(StoreError, match="too large for fp16: ids 'row-1'"):
        half.append(rows, ids_of(3))
    with GradientStore.create(tmp_path / "b", LAYERS, "int8", scale="fp16") as store:
        with pytest.raises(StoreError, match="too large for int8, fp16 scales of 128 numbers: ids 'row-1'"):
            store.append(rows, ids_of(3))
        with pytest.raises(StoreError, match=r"too small for int8.*ids 'row-1'.*use fp32 scales"):
            store.append(rows * torch.tensor([[1.0], [1e-14], [0.0]]), ids_of(3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int5", {}, "format 'int5' is not one of fp32"),
        ("int4", {"block": 48}, "block is 48; it must be a power of two from 32"),
        ("int4", {"block": 16}, "block is 16"),
        ("bf16", {"block": 64}, "format bf16 has no scales"),
        ("int4", {"scale": "bf16"}, "scale is 'bf16'"),
    ],
)
def test_formats_that_cannot_be(tmp_path, name, options, message):
    with pytest.raises(StoreError, match=message):
        GradientStore.create(tmp_path / "s", LAYERS, name, **options)
    assert not GradientStore.exists(tmp_path / "s")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_store_of_version_1_is_read_and_continued(tmp_path, name):
    path = write(tmp_path / "s", 12, name)
    made_by_this_version = tree(path)
    text = (path / "manifest.json").read_text().replace('"version": 2', '"version": 1')
    text = text.replace(json.loads(text)["checksum"], durable.ZEROS.decode())
    (path / "manifest.json").write_bytes(durable.seal(text.encode(), text.index(durable.ZEROS.decode()))[0])
    old = GradientStore.open(path)
    assert torch.equal(old.read(0, 12), decoded(rows_of(12), name))
    with GradientStore.open(path, mode="append") as store:
        store.append(*part_of(12, 0, 12), skip_committed=True)
        assert old.content_hash == store.content_hash
    assert made_by_this_version.keys() == tree(path).keys()


def test_a_damaged_scale_is_found(tmp_path):
    store, _ = wide_store(tmp_path / "s", "int4")
    path = tmp_path / "s" / store.manifest.shards[0].names[0]
    data = bytearray(path.read_bytes())
    data[-8 * 74 - 3] ^= 16  # before the 8 rows of 74 bytes lie the scales
    path.write_bytes(data)
    with pytest.raises(StoreError, match="checksum does not fit"):
        GradientStore.open(tmp_path / "s").read(0, 1)


def test_queries_that_are_rounded_too(tmp_path):
    store = lk.GradientStore.open(write(tmp_path / "s", 40, "int8"))
    queries, scale = rows_of(3, seed=1), torch.rand(40)
    rows = lk.quantize_rows(rows_of(40), "int8")
    expected = lk.score_block(queries, rows, query_format="int8") * scale
    torch.testing.assert_close(store.score(queries, scale, query_format="int8"), expected)
    values, index = store.topk(queries, 5, scale, query_format="int8")
    torch.testing.assert_close(values, expected.topk(5).values)
    assert torch.equal(index, expected.topk(5).indices)
    with pytest.raises(lk.StoreError, match="'int8' does not go with rows kept as fp32"):
        lk.GradientStore.open(write(tmp_path / "plain", 5)).score(queries, query_format="int8")
    with pytest.raises(lk.StoreError, match="'int4' does not go with"):
        store.topk(queries, 5, query_format="int4")
