"""Approximate search: exact where it looks at everything, ordered by the exact score where it does not, and measured."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.composition import query_weights
from cir_core.schema import CirError
from cir_core.search import merge_top_k, weighted_top_k
from cir_core.search.approximate import (
    IndexSettings,
    ShardIndex,
    approximate_top_k,
    checked_depth,
    default_depth,
    recall_of_exact,
    wilson_interval,
)
from cir_core.search.index_files import load_arrays, save_arrays

KINDS = ("ivf", "hnsw")
DTYPES = (np.float32, np.float16)


def unit(rng, rows, dim, dtype=np.float32):
    vectors = rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def make(gallery, kind="ivf", spans=None, **chosen):
    """An index over a gallery; spans: [(gallery index, first, stop)] of its blocks, in the order they are read."""
    spans = spans or [(0, 0, len(gallery))]
    rows = sum(stop - first for _, first, stop in spans)

    def blocks():
        return ((offset, gallery[first:stop]) for offset, first, stop in spans)

    return ShardIndex.build(
        blocks, IndexSettings.derived(kind, rows, **chosen), num_rows=rows, dim=gallery.shape[1]
    ), blocks


def query(rng, num, dim, alphas=(0.3, 0.8)):
    image, text = (torch.from_numpy(unit(rng, num, dim)) for _ in range(2))
    weights = {alpha: query_weights("slerp", image, text, alpha) for alpha in alphas}
    return image, text, weights | {"fusion": query_weights("score_fusion", image, text, 0.4)}


def assert_same(found, exact):
    assert found.keys() == exact.keys()
    for key in exact:
        assert torch.equal(found[key].indices, exact[key].indices)
        assert torch.equal(found[key].scores, exact[key].scores)


wild = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "rows": st.integers(1, 120),
        "dim": st.sampled_from([1, 3, 16, 33]),
        "queries": st.integers(1, 9),
        "k": st.integers(1, 130),
        "nlist": st.integers(1, 7),
        "copies": st.integers(0, 60),  # rows that repeat another
        "near": st.integers(0, 40),  # rows one rounding away from another
        "half": st.booleans(),
        "excluded": st.integers(0, 5),
    }
)


@settings(max_examples=60, deadline=None)
@given(wild)
def test_all_lists_give_the_exact_result_bit_for_bit(case):
    rng = np.random.default_rng(case["seed"])
    rows, dim = case["rows"], case["dim"]
    gallery = unit(rng, rows, dim, np.float16 if case["half"] else np.float32)
    for place, source in rng.integers(rows, size=(min(case["copies"], rows), 2)):
        gallery[place] = gallery[source]
    for place, source in rng.integers(rows, size=(min(case["near"], rows), 2)):
        gallery[place] = gallery[source]
        gallery[place, rng.integers(dim)] = np.nextafter(gallery[place, 0], gallery.dtype.type(2))
    image, text, weights = query(rng, case["queries"], dim)
    if rng.random() < 0.3:
        text = image.clone()
        weights = {1.0: query_weights("slerp", image, text, 1.0)}
    exclude = rng.integers(-1, rows, (case["queries"], case["excluded"])).tolist() if case["excluded"] else None
    nlist = min(case["nlist"], rows)
    index, _ = make(gallery, nlist=nlist, seed=case["seed"])
    found = approximate_top_k(index, image, text, weights, case["k"], depth=nlist, exclude=exclude)
    assert_same(found, weighted_top_k(image, text, gallery, weights, case["k"], exclude))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.integers(2, 300), st.integers(1, 40), st.booleans())
def test_what_is_found_has_its_exact_score_and_order(kind, seed, rows, k, half):
    rng = np.random.default_rng(seed)
    gallery = unit(rng, rows, 12, np.float16 if half else np.float32)
    gallery[rng.integers(rows)] = gallery[0]
    image, text, weights = query(rng, 5, 12)
    exclude = rng.integers(-1, rows, 5).tolist()
    index, _ = make(gallery, kind, **({"nlist": min(rows, 9)} if kind == "ivf" else {"hnsw_m": 4}))
    found = approximate_top_k(index, image, text, weights, k, depth=1, exclude=exclude)
    whole = weighted_top_k(image, text, gallery, weights, rows, exclude)
    for key, top in found.items():
        for row in range(5):
            mine = top.indices[row][top.indices[row] >= 0].tolist()
            order = whole[key].indices[row].tolist()
            places = [order.index(one) for one in mine]
            assert places == sorted(set(places))
            assert exclude[row] not in mine
            assert torch.equal(top.scores[row, : len(mine)], whole[key].scores[row][places])
            if kind == "ivf":  # however few lists were asked for, a list is filled
                assert len(mine) == min(k, rows - (exclude[row] >= 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_or_lists_that_are_searched_find_most(kind, dtype):
    rng = np.random.default_rng(1)
    gallery = unit(rng, 3000, 32, dtype)
    image, text, weights = query(rng, 50, 32)
    index, _ = make(gallery, kind)
    exact = weighted_top_k(image, text, gallery, weights, 10)
    recalls = []
    for depth in (1, 30, 120):
        depth = min(depth, index.settings.nlist or depth)
        found = approximate_top_k(index, image, text, weights, 10, depth=depth)
        recalls.append(recall_of_exact(found[0.8].indices, exact[0.8].indices, 10).mean())
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_shards_merge_to_one_gallery_and_keep_gallery_indices(kind):
    rng = np.random.default_rng(2)
    gallery = unit(rng, 400, 16)
    gallery[300] = gallery[7]
    image, text, weights = query(rng, 20, 16)
    exclude = rng.integers(400, size=20).tolist()
    parts = [[(0, 0, 130)], [(350, 350, 400), (130, 130, 350)]]  # uneven, and not in order
    indexes = [make(gallery, kind, spans)[0] for spans in parts]
    found = [approximate_top_k(index, image, text, weights, 15, depth=400, exclude=exclude) for index in indexes]
    merged = {key: merge_top_k([part[key] for part in found], 15) for key in weights}
    assert_same(merged, weighted_top_k(image, text, gallery, weights, 15, exclude))


def test_a_thousand_copies_of_the_best_image_are_ordered_by_index():
    rng = np.random.default_rng(3)
    gallery = unit(rng, 1500, 8)
    gallery[200:1200] = gallery[200]
    image = torch.from_numpy(gallery[200:201].copy())
    weights = {0: query_weights("image_only", image, image)}
    index, _ = make(gallery, nlist=20)
    found = approximate_top_k(index, image, image, weights, 12, depth=1)[0]
    assert found.indices[0].tolist() == list(range(200, 212))


def test_scores_closer_than_faiss_can_tell_apart_are_ordered_by_the_definition():
    rng = np.random.default_rng(11)
    gallery = unit(rng, 600, 257)
    gallery[100:500] = gallery[100] + 2e-8 * rng.standard_normal(
        (400, 257)
    )  # scores within a few units in the last place
    image = torch.from_numpy(gallery[[100, 250, 499]].copy())
    text = torch.from_numpy(unit(rng, 3, 257))
    weights = {alpha: query_weights("slerp", image, text, alpha) for alpha in (0.1, 0.3)}
    index, _ = make(gallery, nlist=3)
    found = approximate_top_k(index, image, text, weights, 10, depth=3)
    assert_same(found, weighted_top_k(image, text, gallery, weights, 10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_index_answers_as_the_one_that_was_built(tmp_path, kind, dtype):
    rng = np.random.default_rng(4)
    gallery = unit(rng, 700, 24, dtype)
    image, text, weights = query(rng, 300, 24)  # more than one chunk
    built, blocks = make(gallery, kind, spans=[(1000, 0, 300), (5000, 300, 700)], seed=9)
    again, _ = make(gallery, kind, spans=[(1000, 0, 300), (5000, 300, 700)], seed=9)
    assert all(np.array_equal(built.arrays[name], again.arrays[name]) for name in built.arrays)
    name = f"{tmp_path}/shard-0"
    assert load_arrays(name, {}) is None
    made = {"store": "abc", "dim": 24}
    save_arrays(name, built.arrays, made)
    restored = ShardIndex.restore(blocks, built.settings, load_arrays(name, made), num_rows=700, dim=24)
    found = [approximate_top_k(one, image, text, weights, 20, depth=4) for one in (built, restored)]
    assert_same(*found)
    assert np.array_equal(restored.rows(np.arange(700)), gallery.astype(np.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"shard-0.json", "shard-0.safetensors"}


def test_a_seed_decides_an_index():
    gallery = unit(np.random.default_rng(5), 600, 8)
    for kind, name in (("ivf", "centroids"), ("hnsw", "levels")):
        first, second = (make(gallery, kind, seed=seed)[0].arrays[name] for seed in (0, 1))
        assert not np.array_equal(first, second)


def test_another_stores_index_and_a_damaged_one_are_refused(tmp_path):
    index, _ = make(unit(np.random.default_rng(6), 200, 8))
    name = f"{tmp_path}/shard"
    save_arrays(name, index.arrays, {"store": "abc", "faiss": "1"})
    with pytest.raises(CirError, match=r"made of something else \(store: 'abc' there, 'xyz' here\)"):
        load_arrays(name, {"store": "xyz", "faiss": "1"})
    with pytest.raises(CirError, match="faiss: '1' there, None here"):
        load_arrays(name, {"store": "abc"})
    data = tmp_path / "shard.safetensors"
    whole = data.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        data.write_bytes(damaged)
        with pytest.raises(CirError, match="checksum"):
            load_arrays(name, {"store": "abc", "faiss": "1"})
    (tmp_path / "shard.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CirError, match="not an approximate index"):
        load_arrays(name, {"store": "abc", "faiss": "1"})


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("ivf", "lists", lambda a: a + 50),
        ("ivf", "lists", lambda a: a - 1),
        ("ivf", "lists", lambda a: a[1:]),
        ("ivf", "lists", lambda a: a.astype(np.int64)),
        ("ivf", "centroids", lambda a: a[:, 1:]),
        ("ivf", "centroids", lambda a: a * np.nan),
        ("ivf", "more", lambda _: np.zeros(3)),
        ("hnsw", "neighbors", lambda a: a + 200),
        ("hnsw", "neighbors", lambda a: a - 1),
        ("hnsw", "neighbors", lambda a: a[:-1]),
        ("hnsw", "neighbors", lambda a: np.flip(a).copy()),  # leads up to rows that are not there
        ("hnsw", "levels", lambda a: a + 1),
        ("hnsw", "levels", lambda a: np.roll(a, 1)),
        ("hnsw", "levels", lambda a: a * 0),
        ("hnsw", "levels", lambda a: np.where(a == 1, 2**31 - 1, a).astype(np.int32)),
        ("hnsw", "entry_point", lambda a: a * 0 - 1),
        ("hnsw", "entry_point", lambda a: a * 0 + 200),
    ],
)
def test_arrays_that_would_lead_outside_are_refused(kind, name, change):
    rng = np.random.default_rng(7)
    index, blocks = make(unit(rng, 200, 8), kind, **({"hnsw_m": 2} if kind == "hnsw" else {"nlist": 5}))
    changed = index.arrays | {name: change(index.arrays.get(name))}
    with pytest.raises(CirError, match="approximate index"):
        ShardIndex.restore(blocks, index.settings, changed, num_rows=200, dim=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 30))
def test_a_graph_with_any_links_changed_is_refused_or_searched(seed, changes):
    rng = np.random.default_rng(seed)
    index, blocks = make(unit(rng, 80, 6), "hnsw", hnsw_m=3, seed=seed)
    neighbors = index.arrays["neighbors"].copy()
    neighbors[rng.integers(neighbors.size, size=changes)] = rng.integers(-2, 82, size=changes)
    arrays = index.arrays | {"neighbors": neighbors}
    try:
        restored = ShardIndex.restore(blocks, index.settings, arrays, num_rows=80, dim=6)
    except CirError:
        return
    image, text, weights = query(rng, 10, 6)
    found = approximate_top_k(restored, image, text, weights, 9, depth=30)
    assert int(found[0.8].indices.max()) < 80


def test_mistakes_are_named():
    rng = np.random.default_rng(8)
    gallery = unit(rng, 100, 8)
    image, text, weights = query(rng, 3, 8)
    index, blocks = make(gallery, train_rows=50)
    for arguments, message in [
        (("flat", 100), "unknown kind 'flat'; known: ivf, hnsw"),
        (("ivf", 0), "no rows"),
    ]:
        with pytest.raises(CirError, match=message):
            IndexSettings.derived(*arguments)
    for kind, chosen, message in [
        ("ivf", {"nlist": 101}, "nlist must be a whole number from 1 to 100 .the rows of a shard., not 101"),
        ("ivf", {"nlist": 0}, "nlist"),
        ("ivf", {"nlist": 50, "train_rows": 49}, "train_rows must be a whole number from 50 to 100"),
        ("ivf", {"hnsw_m": 3}, "hnsw_m is a setting of hnsw, and the kind is ivf"),
        ("hnsw", {"nlist": 3}, "nlist is a setting of ivf"),
        ("hnsw", {"hnsw_m": 1}, "hnsw_m"),
        ("hnsw", {"ef_construction": 0}, "ef_construction"),
    ]:
        with pytest.raises(CirError, match=message):
            IndexSettings.derived(kind, 100, **chosen)
    with pytest.raises(CirError, match=r"nprobe must be a whole number from 1 to 2 \(at most nlist\), not 3"):
        checked_depth(index.settings, 3, 10)
    with pytest.raises(CirError, match=r"ef_search must be .* \(at least k\), not 9"):
        checked_depth(IndexSettings.derived("hnsw", 100), 9, 10)
    with pytest.raises(CirError, match="k must be"):
        approximate_top_k(index, image, text, weights, 0, depth=1)
    with pytest.raises(CirError, match="exclude"):
        approximate_top_k(index, image, text, weights, 5, depth=1, exclude=[1, 2])
    with pytest.raises(CirError, match=r"two \[Q, 8\]"):
        approximate_top_k(index, image[:, :4], text[:, :4], weights, 5, depth=1)
    for num_rows in (99, 101):
        with pytest.raises(CirError, match="have 100 rows"):
            ShardIndex.build(blocks, index.settings, num_rows=num_rows, dim=8)
    with pytest.raises(CirError, match="rows, 9"):
        ShardIndex.build(blocks, index.settings, num_rows=100, dim=9)
    gallery[17, 3] = np.nan
    with pytest.raises(CirError, match="gallery row 17 holds NaN"):
        make(gallery)
    mixed = [(0, gallery[:10]), (10, gallery[20:30].astype(np.float16))]
    with pytest.raises(CirError, match="one dtype"):
        ShardIndex.build(lambda: mixed, IndexSettings.derived("hnsw", 20), num_rows=20, dim=8)


def test_defaults_follow_the_size_of_a_shard():
    small, large = (IndexSettings.derived("ivf", rows) for rows in (30, 1_000_000))
    assert (small.nlist, small.train_rows) == (1, 30)
    assert (large.nlist, large.train_rows) == (4000, 256_000)
    assert (default_depth(small, 60), default_depth(large, 60)) == (1, 500)
    graph = IndexSettings.derived("hnsw", 1000)
    assert (graph.hnsw_m, graph.ef_construction, default_depth(graph, 60), default_depth(graph, 100)) == (
        32,
        200,
        128,
        200,
    )


def test_without_faiss_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(CirError, match=r"pip install 'slerp-tat\[ann\]'"):
        make(unit(np.random.default_rng(0), 50, 4))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_recall_is_the_share_of_the_exact_list(exact, seed):
    rng = np.random.default_rng(seed)
    found = rng.permutation(41)[: len(exact)].tolist()
    found[-1] = -1
    for k in range(1, len(exact) + 1):
        (recall,) = recall_of_exact(torch.tensor([found]), torch.tensor([exact]), k)
        assert recall == pytest.approx(len(set(found[:k]) & set(exact[:k])) / k)


def test_recall_of_short_and_empty_lists():
    found, exact = torch.tensor([[3, -1], [-1, -1], [5, -1]]), torch.tensor([[3, -1], [-1, -1], [4, -1]])
    assert recall_of_exact(found, exact, 2).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(CirError, match="or longer"):
        recall_of_exact(found, exact, 3)


def test_wilson_interval():
    # R: prop.test(90, 100, correct = FALSE)$conf.int
    interval = wilson_interval([1.0] * 90 + [0.0] * 10)
    assert (interval.low, interval.high) == pytest.approx((0.8256343, 0.9447708), abs=1e-7)
    with pytest.raises(CirError, match="at least one"):
        wilson_interval([])
    with pytest.raises(CirError, match=r"values in \[0, 1\]"):
        wilson_interval([1.2])
