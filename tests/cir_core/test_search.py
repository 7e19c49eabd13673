import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.composition import METHODS, compose, query_weights, slerp
from cir_core.schema import CirError
from cir_core.search import TopK, exact_top_k, merge_top_k, subset_top_k, sweep_top_k, weighted_top_k
from cir_core.search.scan import LinearQueries
from cir_core.search.top_k import pair_dots


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def integers(*shape: int, seed: int, high: int = 3) -> torch.Tensor:
    """Small whole numbers: every sum is exact in any order, and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).float()


def naive(
    queries: torch.Tensor, gallery: torch.Tensor, k: int, exclude: list[list[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 brute force and a whole sort by (-score, index); scores are rounded to float32 first."""
    table = (queries.double() @ gallery.double().T).float().numpy()
    scores = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), -1)
    for q, row in enumerate(table):
        allowed = np.setdiff1d(np.arange(len(row)), exclude[q] if exclude else [])
        order = allowed[np.lexsort((allowed, -row[allowed]))][:k]
        indices[q, : len(order)] = order
        scores[q, : len(order)] = row[order]
    return scores, indices


def assert_same(found: TopK, expected: tuple[np.ndarray, np.ndarray] | TopK) -> None:
    """Equal to the last bit."""
    scores, indices = expected if isinstance(expected, tuple) else (expected.scores.numpy(), expected.indices.numpy())
    np.testing.assert_array_equal(found.indices.numpy(), indices)
    np.testing.assert_array_equal(found.scores.numpy(), scores)
    assert found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64


@pytest.mark.parametrize("dim", [1, 3, 17, 64])
@pytest.mark.parametrize(("num_rows", "k"), [(1, 1), (5, 9), (900, 1), (900, 900), (9000, 10)])
def test_equals_brute_force_under_ties_everywhere(dim: int, num_rows: int, k: int) -> None:
    queries, gallery = integers(6, dim, seed=1), integers(num_rows, dim, seed=2)
    assert_same(exact_top_k(queries, gallery, k), naive(queries, gallery, k))


@pytest.mark.parametrize("dim", [1, 3, 17, 64, 512])
def test_equals_brute_force_on_random_rows(dim: int) -> None:
    queries, gallery = unit(20, dim, seed=1), unit(20_000, dim, seed=2)
    found = exact_top_k(queries, gallery, 50)
    scores, indices = naive(queries, gallery, 50)
    # Two orders of float64 addition may round apart, so ids are compared where the scores differ.
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-7)
    apart = np.abs(np.diff(scores, axis=1)) > 1e-6
    clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True) & np.pad(apart, ((0, 0), (0, 1)))
    np.testing.assert_array_equal(found.indices.numpy()[clear], indices[clear])
    if dim == 1:
        np.testing.assert_array_equal(found.indices.numpy(), indices)


def near_ties(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    """One direction, each row moved by a few units in the last place: float32 products cannot tell the rows apart."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2, 3, (num_rows, dim), generator=generator)
    rows = unit(1, dim, seed=seed).expand(num_rows, dim).contiguous()
    return (rows.view(torch.int32) + steps.int()).view(torch.float32)


@pytest.mark.parametrize("dim", [64, 512])
def test_near_ties_are_ranked_by_the_exact_score_where_float32_products_fail(dim: int) -> None:
    gallery, queries = near_ties(6000, dim, seed=3), unit(1, dim, seed=3)
    rows = torch.arange(6000)
    exact = pair_dots(queries, gallery, torch.zeros_like(rows), rows).float().numpy()
    order = np.lexsort((rows.numpy(), -exact))[:40]
    found = exact_top_k(queries, gallery, 40)
    assert_same(found, (exact[order][None], order[None]))
    plain = torch.topk(queries @ gallery.T, 40).indices
    assert not torch.equal(plain.sort().values, found.indices.sort().values), "rows must be hard to rank"
    true = np.array(
        [float(np.sum(queries[0].numpy().astype(np.longdouble) * g.astype(np.longdouble))) for g in gallery.numpy()]
    )
    assert np.abs(exact - true).max() <= np.spacing(np.float32(1.0))


def test_pair_dots_do_not_depend_on_the_company_and_are_right() -> None:
    left, right = normal(20, 301, seed=1), normal(30, 301, seed=2)
    i, j = torch.cartesian_prod(torch.arange(20), torch.arange(30)).unbind(1)
    together = pair_dots(left, right, i, j)
    alone = torch.cat([pair_dots(left[a : a + 1], right[b : b + 1], i[:1], j[:1]) for a, b in zip(i, j, strict=True)])
    assert torch.equal(together, alone)
    torch.testing.assert_close(together.view(20, 30), left.double() @ right.double().T, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_blocks_and_any_shards_equal_one_search_bit_for_bit(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 300), "rows")
    dim, k = data.draw(st.sampled_from([1, 3, 17, 64]), "dim"), data.draw(st.integers(1, 20), "k")
    make = data.draw(st.sampled_from([normal, unit, integers, near_ties]), "rows of")
    gallery = make(num_rows, dim, seed=data.draw(st.integers(0, 99), "seed"))
    copies = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20), "copied rows")
    gallery[: len(copies)] = gallery[copies][:num_rows]
    image, text = unit(5, dim, seed=1), unit(5, dim, seed=2)
    weights = {name: query_weights(name, image, text, 0.7 if METHODS[name].takes_alpha else None) for name in METHODS}
    cuts = data.draw(st.lists(st.integers(0, num_rows), max_size=8), "cuts")
    edges = [0, *sorted(cuts), num_rows]
    pieces = [(start, gallery[start:stop]) for start, stop in itertools.pairwise(edges)]
    whole = weighted_top_k(image, text, gallery, weights, k)
    in_blocks = weighted_top_k(image, text, [block for _, block in pieces], weights, k)
    shuffled = weighted_top_k(image, text, data.draw(st.permutations(pieces), "order"), weights, k)
    shards = [weighted_top_k(image, text, [piece], weights, k) for piece in pieces if len(piece[1])]
    by_query = [
        weighted_top_k(v[None], w[None], gallery, {0: (a[None], b[None])}, k)[0]
        for v, w, a, b in zip(image, text, *weights["slerp"], strict=True)
    ]
    for name in METHODS:
        assert_same(in_blocks[name], whole[name])
        assert_same(shuffled[name], whole[name])
        assert_same(merge_top_k([shard[name] for shard in shards], k), whole[name])
    assert torch.equal(torch.cat([one.indices for one in by_query]), whole["slerp"].indices)
    assert torch.equal(torch.cat([one.scores for one in by_query]), whole["slerp"].scores)


@pytest.mark.parametrize("block_rows", [1, 7, 4096, 30_000])
def test_block_size_changes_nothing_over_many_tiles(block_rows: int) -> None:
    """Galleries larger than one tile, where float32 products of different shapes round differently."""
    image, text, gallery = unit(300, 24, seed=1), unit(300, 24, seed=2), unit(30_000, 24, seed=3)
    blocks = (gallery[start : start + block_rows] for start in range(0, 30_000, block_rows))
    found = sweep_top_k(image, text, blocks, [0.0, 0.5, 0.9], 12)
    parts = [
        sweep_top_k(image, text, [(at, gallery[at : at + 9001])], [0.0, 0.5, 0.9], 12) for at in range(0, 30_000, 9001)
    ]
    for alpha, top in found.items():
        assert_same(merge_top_k([part[alpha] for part in parts], 12), top)


def test_sweep_equals_a_search_of_composed_queries_per_alpha() -> None:
    image, text, gallery = unit(30, 64, seed=1), unit(30, 64, seed=2), unit(20_000, 64, seed=3)
    alphas = [0.0, 0.3, 0.5, 0.8, 1.0]
    swept = sweep_top_k(image, text, gallery, alphas, 20)
    assert list(swept) == alphas
    for alpha, top in swept.items():
        scores, indices = naive(slerp(image.double(), text.double(), alpha), gallery, 20)
        np.testing.assert_allclose(top.scores.numpy(), scores, atol=1e-6)
        np.testing.assert_allclose(
            exact_top_k(slerp(image, text, alpha), gallery, 20).scores.numpy(), scores, atol=1e-6
        )
        clear = np.abs(np.diff(scores, axis=1)).min(axis=1) > 1e-6
        assert clear.sum() > 20
        np.testing.assert_array_equal(top.indices.numpy()[clear], indices[clear])


def test_every_method_comes_from_one_pass() -> None:
    image, text, gallery = unit(9, 32, seed=1), unit(9, 32, seed=2), unit(5000, 32, seed=3)
    passes = 0

    def blocks():  # type: ignore[no-untyped-def]
        nonlocal passes
        passes += 1
        yield from gallery.split(700)

    alphas = {name: 0.6 if method.takes_alpha else None for name, method in METHODS.items()}
    weights = {name: query_weights(name, image, text, alpha) for name, alpha in alphas.items()}
    found = weighted_top_k(image, text, blocks(), weights, 10)
    assert passes == 1
    for name, top in found.items():
        scores, _ = naive(compose(name, image, text, alphas[name]), gallery, 10)
        np.testing.assert_allclose(top.scores.numpy(), scores, atol=1e-6)


def test_negative_weights_subtract_the_text() -> None:
    image, text, gallery = integers(8, 16, seed=1), integers(8, 16, seed=2), integers(20_000, 16, seed=3)
    weights = {"minus": (torch.ones(8), torch.full((8,), -2.0)), "none": (torch.zeros(8), torch.zeros(8))}
    found = weighted_top_k(image, text, gallery, weights, 15)
    assert_same(found["minus"], naive(image - 2 * text, gallery, 15))
    assert_same(found["none"], naive(0 * image, gallery, 15))


def test_excluded_images_are_left_out_and_the_list_stays_full() -> None:
    queries, gallery = integers(40, 8, seed=1), integers(15_000, 8, seed=2)
    best = exact_top_k(queries, gallery, 6).indices
    expected = naive(queries, gallery, 5, exclude=best[:, :2].tolist())
    assert_same(exact_top_k(queries, gallery, 5, exclude=best[:, :2]), expected)
    assert_same(exact_top_k(queries, gallery.split(999), 5, exclude=best[:, :2].tolist()), expected)
    first = naive(queries, gallery, 5, exclude=best[:, :1].tolist())
    assert_same(exact_top_k(queries, gallery, 5, exclude=best[:, 0]), first)
    assert_same(exact_top_k(queries, gallery, 5, exclude=best[:, 0].tolist()), first)
    nothing = [[-1, 10**9] for _ in range(40)]
    assert_same(exact_top_k(queries, gallery, 5, exclude=nothing), naive(queries, gallery, 5))
    ragged = [[int(row[0])] if q % 2 else [] for q, row in enumerate(best)]
    assert_same(exact_top_k(queries, gallery, 5, exclude=ragged), naive(queries, gallery, 5, exclude=ragged))


def test_excluding_everything_leaves_padding() -> None:
    queries, gallery = unit(2, 4, seed=1), unit(3, 4, seed=2)
    found = exact_top_k(queries, gallery, 2, exclude=[[0, 1, 2], [1, 2, 2]])
    assert found.indices.tolist() == [[-1, -1], [0, -1]]
    assert found.scores[0].tolist() == [-np.inf, -np.inf]


def test_subsets_rank_the_same_scores_among_their_own() -> None:
    image, text, gallery = unit(11, 16, seed=1), unit(11, 16, seed=2), unit(500, 16, seed=3)
    gallery[100:200] = gallery[:100]
    pick = np.random.default_rng(0)
    subsets = [sorted(pick.choice(500, size=int(pick.integers(1, 9)), replace=False).tolist()) for _ in range(11)]
    subsets[0] = [5, 105, 7, 107]
    weights = {alpha: query_weights("slerp", image, text, alpha) for alpha in (0.2, 0.9)}
    full = weighted_top_k(image, text, gallery, weights, 500)
    found = subset_top_k(image, text, gallery.split(60), weights, subsets)
    for alpha, top in found.items():
        for q, subset in enumerate(subsets):
            mine = torch.isin(full[alpha].indices[q], torch.tensor(subset))
            assert top.indices[q, : len(subset)].tolist() == full[alpha].indices[q][mine].tolist()
            assert torch.equal(top.scores[q, : len(subset)], full[alpha].scores[q][mine])
            assert (top.indices[q, len(subset) :] == -1).all()
    assert subset_top_k(image, text, gallery, weights, subsets, k=1)[0.2].indices.shape == (11, 1)


def test_many_duplicates_of_the_best_row_stay_right() -> None:
    """More candidates than fit one list: ties must go to the lowest indices, whatever the order of the blocks."""
    queries = integers(3, 5, seed=1)
    gallery = integers(1, 5, seed=2).expand(20_000, 5).contiguous()
    gallery[7] = 0
    expected = naive(queries, gallery, 30)
    assert_same(exact_top_k(queries, gallery, 30), expected)
    blocks = [(start, gallery[start : start + 4000]) for start in range(0, 20_000, 4000)]
    assert_same(exact_top_k(queries, blocks[::-1], 30), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_a_gallery_sorted_by_score_stays_right(order: int) -> None:
    gallery = (order * torch.arange(40_000.0))[:, None]
    queries = torch.tensor([[1.0], [-1.0], [0.5]])
    assert_same(exact_top_k(queries, gallery, 25), naive(queries, gallery, 25))


def test_one_huge_row_does_not_hide_the_rest() -> None:
    queries, gallery = integers(4, 8, seed=1), integers(30_000, 8, seed=2)
    gallery[20_000] *= 1e9
    assert_same(exact_top_k(queries, gallery, 10), naive(queries, gallery, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_galleries_are_exact_too(dtype: torch.dtype) -> None:
    queries, gallery = unit(12, 48, seed=1), unit(9000, 48, seed=2).to(dtype)
    assert_same(exact_top_k(queries, gallery, 20), exact_top_k(queries, gallery.float(), 20))
    if dtype == torch.float16:
        read_only = gallery.numpy().copy()
        read_only.flags.writeable = False
        assert_same(
            exact_top_k(queries.numpy(), [read_only[:5000], read_only[5000:]], 20),
            exact_top_k(queries, gallery, 20),
        )
        backwards = exact_top_k(queries, gallery.numpy()[::-1], 1).indices
        assert torch.equal(8999 - backwards, exact_top_k(queries, gallery, 1).indices)


def test_a_reader_may_reuse_its_buffer() -> None:
    queries, gallery = unit(5, 8, seed=1), unit(1000, 8, seed=2)
    buffer = np.empty((100, 8), np.float32)

    def blocks():  # type: ignore[no-untyped-def]
        for part in gallery.split(100):
            buffer[:] = part.numpy()
            yield buffer

    assert_same(exact_top_k(queries, blocks(), 10), exact_top_k(queries, gallery, 10))


def test_low_precision_settings_do_not_reach_the_scan_and_survive_it() -> None:
    queries, gallery = unit(8, 64, seed=1), unit(9000, 64, seed=2)
    expected = exact_top_k(queries, gallery, 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(exact_top_k(queries.requires_grad_(), gallery, 20), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_error_bound_holds_and_is_small() -> None:
    """A scanned float32 score is within E of the exact one."""
    image, text, gallery = unit(16, 128, seed=1), unit(16, 128, seed=2), unit(3000, 128, seed=3)
    weights = torch.stack([torch.stack(query_weights("slerp", image, text, 0.8))])
    queries = LinearQueries.checked((image, text), weights)
    parts = [
        weight[:, None].float() * (rows @ gallery.T) for weight, rows in zip(weights[0], (image, text), strict=True)
    ]
    q, g = torch.cartesian_prod(torch.arange(16), torch.arange(3000)).unbind(1)
    exact = queries.exact_scores(0, q, [pair_dots(rows, gallery, q, g) for rows in (image, text)]).view(16, 3000)
    bound = queries.error_scale()[0] * float(gallery.norm(dim=1).max())
    assert ((sum(parts).double() - exact.double()).abs().amax(1) <= bound).all()
    assert float(bound.max()) < 5e-5


def test_the_torch_scan_scores_few_rows_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = 0
    monkeypatch.setattr("cir_core.search.kernels.is_compiled", lambda: False)

    def counted(left: torch.Tensor, right: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        nonlocal scored
        scored += len(i)
        return pair_dots(left, right, i, j)

    monkeypatch.setattr("cir_core.search.scan.pair_dots", counted)
    exact_top_k(unit(64, 64, seed=1), unit(100_000, 64, seed=2), 10)
    assert 64 * 10 <= scored < 64 * 100  # of 6.4 million


def test_merge_orders_ties_by_index_and_pads() -> None:
    low = TopK(torch.tensor([[0.5, 0.5]]), torch.tensor([[4, 9]]))
    high = TopK(torch.tensor([[0.5, -torch.inf]]), torch.tensor([[2, -1]]))
    merged = merge_top_k([low, high], 5)
    assert merged.indices.tolist() == [[2, 4, 9, -1, -1]]
    assert merged.scores.tolist() == [[0.5, 0.5, 0.5, -np.inf, -np.inf]]
    assert merge_top_k([low, high], 2).indices.tolist() == [[2, 4]]
    with pytest.raises(CirError, match="index 4 is in two parts"):
        merge_top_k([low, low], 2)
    with pytest.raises(CirError, match="at least one part"):
        merge_top_k([], 2)
    with pytest.raises(CirError, match="different numbers of queries"):
        merge_top_k([low, TopK(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))], 2)
    with pytest.raises(CirError, match="float32 scores"):
        TopK(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64))


def test_no_queries_give_an_empty_result() -> None:
    found = exact_top_k(torch.zeros(0, 4), unit(10, 4, seed=1), 3)
    assert found.indices.shape == found.scores.shape == (0, 3)


def test_bad_input_is_named() -> None:
    queries, gallery = unit(3, 8, seed=1), unit(20, 8, seed=2)
    broken = gallery.clone()
    broken[13, 2] = torch.nan
    cases = [
        (lambda: exact_top_k(queries, gallery[:, :5], 3), r"block 0 must have shape \[rows, 8\]"),
        (lambda: exact_top_k(queries, [gallery, gallery[0]], 3), "block 1"),
        (lambda: exact_top_k(queries, gallery.double(), 3), "float64"),
        (lambda: exact_top_k(queries.double(), gallery, 3), "float64"),
        (lambda: exact_top_k(queries, gallery.numpy().astype(">f4"), 3), "native byte order"),
        (lambda: exact_top_k(queries, [gallery.tolist()], 3), "not list"),
        (lambda: exact_top_k(queries, [gallery[:4], broken], 3), "gallery row 17 holds NaN"),
        (lambda: exact_top_k(queries * torch.inf, gallery, 3), "queries: row 0"),
        (lambda: exact_top_k(queries, gallery, 0), "k must be"),
        (lambda: exact_top_k(queries, gallery, 2.0), "k must be"),  # type: ignore[arg-type]
        (lambda: exact_top_k(queries, [], 3), "no rows"),
        (lambda: exact_top_k(queries, gallery[:0], 3), "no rows"),
        (lambda: exact_top_k(queries, [(0, gallery), gallery], 3), "offset with every block"),
        (lambda: exact_top_k(queries, [(0, gallery), (19, gallery)], 3), "overlap"),
        (lambda: exact_top_k(queries, [(-1, gallery)], 3), "negative"),
        (lambda: exact_top_k(queries, gallery, 3, exclude=[1, 2]), "exclude"),
        (lambda: exact_top_k(queries, gallery, 3, exclude=[1, -2, 3]), "-2"),
        (lambda: exact_top_k(queries, gallery, 3, exclude=torch.zeros(3)), "exclude"),
        (lambda: sweep_top_k(queries, queries, gallery, [], 3), "at least one"),
        (lambda: sweep_top_k(queries, queries[:2], gallery, [0.5], 3), r"\[2, 8\]"),
        (lambda: sweep_top_k(queries, queries * 2, gallery, [0.5], 3), "unit norm"),
        (lambda: sweep_top_k(queries, queries, gallery, [1.5], 3), "alpha"),
        (lambda: weighted_top_k(queries, queries, gallery, {"a": (torch.ones(2), torch.ones(3))}, 3), "'a'"),
        (
            lambda: weighted_top_k(queries, queries, gallery, {"a": (torch.ones(3), torch.ones(3) * torch.nan)}, 3),
            "finite",
        ),
    ]
    for search, said in cases:
        with pytest.raises(CirError, match=said):
            search()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_bit_for_bit() -> None:
    image, text, gallery = unit(300, 512, seed=1), unit(300, 512, seed=2), unit(200_000, 512, seed=3)
    on_cpu = sweep_top_k(image, text, gallery, [0.0, 0.8, 1.0], 50)
    on_cuda = sweep_top_k(image.cuda(), text.cuda(), gallery.split(30_000), [0.0, 0.8, 1.0], 50)
    for alpha, top in on_cuda.items():
        assert_same(TopK(top.scores.cpu(), top.indices.cpu()), on_cpu[alpha])
