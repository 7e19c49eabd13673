"""The compiled scan against the torch one and brute force, bit for bit, on data made to break it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_data import KINDS, brute_force, cone, generator, same, unit

from cir_core.schema import CirError
from cir_core.search import (
    exact_top_k,
    kernels,
    merge_top_k,
    prepare_gallery,
    read_ahead,
    subset_top_k,
    sweep_top_k,
    weighted_top_k,
    weighted_top_k_with_subsets,
)
from cir_core.search.compiled_scan import CompiledScan, mean_row
from cir_core.search.queries import LinearQueries
from cir_core.search.single_pass import one_pass
from cir_core.search.top_k import torch_pair_dots

needs_loops = pytest.mark.skipif(not kernels.is_compiled(), reason="installed without a C compiler")
SCAN_DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=SCAN_DTYPES, ids=str)
def scan_dtype(request, monkeypatch):
    """Both kinds of processors: those with fast bfloat16 products and those without."""
    for module in ("compiled_scan", "prepared"):
        monkeypatch.setattr(f"cir_core.search.{module}.scan_dtype", lambda: request.param)
    return request.param


def in_torch(monkeypatch, function, *arguments, **keywords):
    with monkeypatch.context() as patch:
        patch.setattr("cir_core.search.kernels.is_compiled", lambda: False)
        return function(*arguments, **keywords)


@needs_loops
@settings(max_examples=150)
@given(data=st.data())
def test_equals_brute_force_whatever_the_data(data):
    draw = data.draw
    num_rows, num_queries = draw(st.integers(1, 700), "rows"), draw(st.integers(1, 6), "queries")
    dim, k = draw(st.sampled_from([1, 3, 17, 64, 130]), "dim"), draw(st.integers(1, 400), "k")
    gallery = draw(st.sampled_from(KINDS), "rows of")(num_rows, dim, seed=draw(st.integers(0, 99), "seed"))
    gallery = gallery.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), "dtype"))
    if not bool(gallery.isfinite().all()):
        gallery = gallery.clamp(-6e4, 6e4)
    parts = tuple(draw(st.sampled_from(KINDS), "queries of")(num_queries, dim, seed=s) for s in (1, 2))
    num_keys = draw(st.sampled_from([1, 2, 3, 5, 16, 21]), "keys")
    weights = torch.randn(num_keys, 2, num_queries, generator=generator(5), dtype=torch.float64)
    if draw(st.booleans(), "weights of one sign"):
        weights = weights.abs()
    queries = LinearQueries.checked(parts, weights)
    exclude = torch.randint(-1, num_rows, (num_queries, draw(st.integers(1, 3), "excluded")), generator=generator(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cir_core.search.compiled_scan.scan_dtype", lambda: draw(st.sampled_from(SCAN_DTYPES), "scanned in")
        )
        scan = CompiledScan(queries, k, exclude.sort(dim=1).values)
    scan.capacity = max(k + 1, draw(st.sampled_from([8, 32, 400]), "capacity"))  # lists that overflow are settled early
    edges = sorted({0, num_rows, *draw(st.lists(st.integers(0, num_rows), max_size=3), "cuts")})
    blocks = [(a, gallery[a:b]) for a, b in itertools.pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        if draw(st.booleans(), "blocks stay apart"):
            patch.setattr("cir_core.search.single_pass.MIN_BLOCK_ROWS", 1)
        one_pass(queries, draw(st.permutations(blocks), "order"), [scan])
    for found, expected in zip(scan.results(), brute_force(queries, gallery, k, exclude), strict=True):
        same(found, expected)


@needs_loops
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("num_alphas", [1, 4])
def test_equals_the_torch_scan_over_many_tiles(scan_dtype, monkeypatch, kind, num_alphas):
    image, text, gallery = unit(12, 24, seed=1), unit(12, 24, seed=2), kind(9001, 24, seed=3)
    alphas = [number / 3 for number in range(num_alphas)]
    exclude = torch.arange(12) * 3
    found = sweep_top_k(image, text, gallery, alphas, 20, exclude)
    prepared = sweep_top_k(image, text, prepare_gallery(gallery.numpy()), alphas, 20, exclude)
    expected = in_torch(monkeypatch, sweep_top_k, image, text, gallery, alphas, 20, exclude)
    for alpha in alphas:
        same(found[alpha], expected[alpha])
        same(prepared[alpha], expected[alpha])


@needs_loops
def test_the_scan_scores_few_rows_exactly(scan_dtype):
    ones = torch.ones(1, 1, 64, dtype=torch.float64)
    scan = CompiledScan(LinearQueries.checked((unit(64, 64, seed=1),), ones), 10, None)
    one_pass(scan.states[0].queries, unit(100_000, 64, seed=2), [scan])
    assert 64 * 10 <= scan.num_exact < 64 * 40  # of 6.4 million


@needs_loops
def test_many_queries_go_through_in_batches(scan_dtype, monkeypatch):
    monkeypatch.setattr("cir_core.search.compiled_scan._LISTS", 600)
    queries, gallery = unit(1500, 16, seed=1), unit(2000, 16, seed=2)
    whole = exact_top_k(queries, gallery, 5)
    same(whole, in_torch(monkeypatch, exact_top_k, queries, gallery, 5))
    assert (
        len(
            CompiledScan(LinearQueries.checked((queries,), torch.ones(1, 1, 1500, dtype=torch.float64)), 5, None).states
        )
        == 3
    )


@needs_loops
def test_prepared_galleries_mix_with_plain_blocks_and_shards_merge(scan_dtype):
    queries, gallery = cone(9, 33, seed=1), cone(30_000, 33, seed=2).half()
    whole = exact_top_k(queries, gallery, 25)
    prepared = prepare_gallery(gallery)
    assert len(prepared) == 30_000
    same(exact_top_k(queries, prepared, 25), whole)
    same(exact_top_k(queries, [(20_000, gallery[20_000:]), (0, prepare_gallery(gallery[:20_000]))], 25), whole)
    shards = [
        exact_top_k(queries, [(at, prepare_gallery(gallery[at : at + 7001]))], 25) for at in range(0, 30_000, 7001)
    ]
    same(merge_top_k(shards, 25), whole)


@needs_loops
def test_a_prepared_memory_map_is_read_only_where_a_candidate_is(tmp_path, scan_dtype):
    gallery = unit(5000, 24, seed=2).half().numpy()
    gallery.tofile(tmp_path / "gallery")
    mapped = np.memmap(tmp_path / "gallery", np.float16, "r", shape=gallery.shape)
    prepared = prepare_gallery(mapped)
    assert np.shares_memory(prepared.rows, mapped)
    same(exact_top_k(unit(4, 24, seed=1), prepared, 7), exact_top_k(unit(4, 24, seed=1), gallery, 7))


@needs_loops
@pytest.mark.parametrize(
    "make", [lambda x: x[:, ::2], lambda x: np.asfortranarray(x), lambda x: x[::3], lambda x: x[::-1]]
)
def test_strided_galleries(scan_dtype, monkeypatch, make):
    gallery = make(unit(20_000, 48, seed=2).numpy())
    queries = unit(5, gallery.shape[1], seed=1)
    expected = in_torch(monkeypatch, exact_top_k, queries, gallery.copy(), 8)
    same(exact_top_k(queries, gallery, 8), expected)
    if min(gallery.strides) > 0:
        same(exact_top_k(queries, torch.from_numpy(gallery), 8), expected)


@needs_loops
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_row_that_cannot_be_searched_is_named(scan_dtype, bad):
    gallery = unit(20_000, 8, seed=1)
    gallery[17_123, 3] = bad
    with pytest.raises(CirError, match="gallery row 17123 holds NaN, infinity"):
        exact_top_k(unit(2, 8, seed=2), gallery, 3)
    with pytest.raises(CirError, match="gallery row 17123 holds NaN, infinity"):
        prepare_gallery(gallery)
    with pytest.raises(CirError, match="gallery row 27123 holds NaN, infinity"):
        exact_top_k(unit(2, 8, seed=2), [(10_000, gallery)], 3)


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(CirError, match="float16, bfloat16 or float32"):
        prepare_gallery(np.zeros((3, 2)))
    with pytest.raises(CirError, match="shape"):
        prepare_gallery(torch.zeros(3))
    with pytest.raises(CirError, match="no rows"):
        prepare_gallery(torch.zeros(0, 4))
    with pytest.raises(CirError, match="like the queries"):
        exact_top_k(unit(2, 8, seed=2), prepare_gallery(unit(5, 9, seed=1)), 3)


@needs_loops
def test_half_precision_rows_are_read_as_they_are():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rows = every[np.isfinite(every)].reshape(-1, 1)
    numbers = torch.arange(len(rows))
    found = kernels.pair_dots(torch.ones(1, 1), kernels.Rows(rows), torch.zeros_like(numbers), numbers)
    np.testing.assert_array_equal(found.numpy(), rows[:, 0].astype(np.float64))


@needs_loops
@given(seed=st.integers(0, 99), dim=st.integers(1, 70))
def test_dots_equal_the_torch_ones_to_the_bit(seed, dim):
    left, right = unit(7, dim, seed=seed), unit(11, dim, seed=seed + 1).bfloat16()
    q, g = torch.cartesian_prod(torch.arange(7), torch.arange(11)).unbind(1)
    assert torch.equal(kernels.pair_dots(left, kernels.Rows(right), q, g), torch_pair_dots(left, right.float(), q, g))


@pytest.mark.parametrize("compiled", [True, False])
def test_the_whole_and_every_query_s_own_list_come_from_one_pass(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("cir_core.search.kernels.is_compiled", lambda: False)
    image, text, gallery = unit(6, 20, seed=1), unit(6, 20, seed=2), unit(3000, 20, seed=3).half()
    half = torch.full((6,), 0.5, dtype=torch.float64)
    weights = {"mean": (half, half), "image": (half * 2, half * 0)}
    subsets = [[1, 2500, 9], [4], [], [7, 8], [2999, 0], [5, 5]]
    passes = 0

    def blocks():
        nonlocal passes
        passes += 1
        yield from ((at, gallery[at : at + 700].numpy()) for at in range(0, 3000, 700))

    exclude = [0, 1, 2, 3, 4, 5]
    whole, own = weighted_top_k_with_subsets(image, text, blocks(), weights, 10, exclude, subsets)
    assert passes == 1
    for name in weights:
        same(whole[name], weighted_top_k(image, text, gallery, weights, 10, exclude)[name])
        same(own[name], subset_top_k(image, text, gallery, weights, subsets)[name])


@pytest.mark.parametrize("compiled", [True, False])
def test_galleries_are_prepared_and_subsets_checked_with_and_without_loops(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "_usable", lambda: None)
    queries, gallery, one = unit(4, 20, seed=1), unit(9000, 20, seed=2).half(), torch.ones(4, dtype=torch.float64)
    prepared = prepare_gallery(gallery.numpy())
    assert len(prepared) == 9000
    same(exact_top_k(queries, prepared, 9), exact_top_k(queries, gallery, 9))
    subsets = [[8999, 3], [1], [], [2]]
    own = subset_top_k(queries, queries, prepared, {0: (one, one)}, subsets)[0]
    same(own, subset_top_k(queries, queries, gallery, {0: (one, one)}, subsets)[0])
    gallery[8999, 7] = torch.nan
    with pytest.raises(CirError, match="gallery row 8999 holds NaN"):
        prepare_gallery(gallery)
    with pytest.raises(CirError, match="gallery row 8999 holds NaN"):
        subset_top_k(queries, queries, gallery, {0: (one, one)}, subsets)


def test_mean_row_of_huge_rows_is_left_out():
    assert bool((mean_row(torch.full((3, 2), 3e38)) == 0).all())


def test_reading_ahead_keeps_order_and_bounds_and_hands_errors_on():
    started = []

    def blocks():
        for number in range(5):
            started.append(number)
            yield number
        raise CirError("the part is damaged")

    with pytest.raises(CirError, match="num_blocks"):
        next(read_ahead(blocks(), 0))
    seen = []
    reading = read_ahead(blocks(), 2)
    for number in reading:
        seen.append(number)
        assert len(started) <= number + 3
        if number == 4:
            break
    assert seen == list(range(5))
    with pytest.raises(CirError, match="damaged"):
        next(reading)


def test_stopping_to_read_closes_the_reader():
    closed = []

    def blocks():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    reading = read_ahead(blocks())
    assert next(reading) == 1
    reading.close()
    assert closed == [True]


@needs_loops
def test_loops_of_another_version_are_not_called(monkeypatch, caplog):
    def structure_sizes():
        return 1

    monkeypatch.setattr(kernels, "_library", SimpleNamespace(structure_sizes=structure_sizes))
    monkeypatch.setattr(kernels, "_usable", kernels._usable.__wrapped__)
    assert not kernels.is_compiled()
    assert "another version" in caplog.text
    monkeypatch.setattr(kernels, "_library", None)
    assert not kernels.is_compiled()
    assert "without the compiled loops" in caplog.text
