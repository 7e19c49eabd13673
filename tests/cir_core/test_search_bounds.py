"""Where the error bound of the scan is tight, and memory that is laid out oddly: against brute force, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cir_core.schema import CirError
from cir_core.search import TopK, exact_top_k, kernels, prepare_gallery, weighted_top_k
from cir_core.search.compiled_scan import CompiledScan, no_centre
from cir_core.search.queries import LinearQueries
from cir_core.search.scan import ieee_float32
from cir_core.search.single_pass import gallery_scan, one_pass
from cir_core.search.top_k import torch_pair_dots

ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture(params=["bfloat16", "float32", "float32 of oneDNN", "bfloat16 as on a GPU"], autouse=True)
def scanned_as(request, monkeypatch):
    dtype = getattr(torch, request.param.split()[0])
    for module in ("compiled_scan", "prepared"):
        monkeypatch.setattr(f"cir_core.search.{module}.scan_dtype", lambda: dtype)
    monkeypatch.setattr("cir_core.search.products.fast_onednn", lambda: ONEDNN and "oneDNN" in request.param)
    monkeypatch.setattr("cir_core.search.single_pass.MIN_BLOCK_ROWS", 1)  # blocks stay apart
    if "GPU" in request.param:
        for module in ("single_pass", "prepared"):
            monkeypatch.setattr(f"cir_core.search.{module}.has_fast_bfloat16", lambda device: True)
        monkeypatch.setattr("cir_core.search.device_scan._SEED_ROWS", 300)
    return dtype


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_brute_force(parts, weights, blocks, k):
    """weights: float64 [K, P, Q]."""
    queries = LinearQueries.checked(parts, weights)
    scan = gallery_scan(queries, k, None)
    one_pass(queries, blocks, [scan])
    gallery = torch.cat(blocks)
    q, g = torch.cartesian_prod(torch.arange(queries.num_queries), torch.arange(len(gallery))).unbind(1)
    dots = [torch_pair_dots(part, gallery, q, g) for part in parts]
    for key, found in enumerate(scan.results()):
        table = queries.exact_scores(key, q, dots).view(queries.num_queries, -1).numpy()
        order = np.argsort(-table, axis=1, kind="stable")[:, :k].copy()
        expected = TopK(torch.from_numpy(np.take_along_axis(table, order, 1)), torch.from_numpy(order))
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("one_sign", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_products_that_only_their_storage_rounds(seed, one_sign):
    # Two dimensions, all numbers exact in bfloat16, a mean of zero: nothing else widens the bound.
    image, text, gallery = (normal(n, 2, seed=10 * seed + i).bfloat16().float() for i, n in enumerate((20, 20, 2000)))
    weights = normal(2, 2, 20, seed=10 * seed + 3).double()
    weights = weights.abs() if one_sign else weights
    assert_equals_brute_force((image, text), weights, list(torch.cat([gallery, -gallery]).split(500)), 3)


@pytest.mark.parametrize("weight", [1e12, 1e-12, 1e-37, 1e-40, 1e-44, 1e-50])
def test_weights_that_float32_cannot_hold(weight):
    image, text, gallery = (
        torch.nn.functional.normalize(normal(n, 32, seed=i), dim=1) * 9e11 for i, n in enumerate((4, 4, 3000))
    )
    weights = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * weight
    assert_equals_brute_force((image, text), weights, list(gallery.split(500)), 5)


def arcs(num_keys: int, num_queries: int) -> torch.Tensor:
    """Weights (cos, sin) of equal parts of a right angle, both ends with it: float64 [K, 2, Q]."""
    angles = torch.linspace(0, torch.pi / 2, num_keys, dtype=torch.float64)
    pairs = torch.stack([angles.cos(), angles.sin()], 1)
    pairs[-1, 0] = 0
    return pairs[:, :, None].repeat(1, 1, num_queries)


@pytest.mark.parametrize("num_keys", [2, 3, 16, 21])
@pytest.mark.parametrize("scale", [(1, 1), (1e9, 1), (1, 1e-9), (1e11, 1e-30), (0, 1), (1, 0)], ids=str)
def test_rows_next_to_what_every_weighting_needs_of_two_products(num_keys, scale):
    # In a plane the two products of a row are its coordinates: an arc of rows, each the best of some direction.
    angles = torch.linspace(-0.5, 2.1, 3000, dtype=torch.float64)[torch.randperm(3000, generator=torch.manual_seed(1))]
    gallery = torch.stack([angles.cos(), angles.sin()], 1).float() * (1 + 1e-6 * normal(3000, 1, seed=2))
    axes = torch.eye(2).repeat(1, 3).view(2, 3, 2)
    weights = arcs(num_keys, 3) * torch.tensor(scale, dtype=torch.float64)[:, None]
    blocks = list(torch.cat([gallery, -gallery, gallery * 0.999]).split(1700))
    assert_equals_brute_force((axes[0].contiguous(), axes[1].contiguous()), weights, blocks, 7)


@pytest.mark.skipif(not kernels.is_compiled(), reason="installed without a C compiler")
def test_the_error_of_a_tile_is_that_of_the_tile_before_only_where_that_was_no_smaller(scanned_as):
    queries = LinearQueries.checked((normal(3, 8, seed=1), normal(3, 8, seed=2)), arcs(5, 3))
    scan, rows = CompiledScan(queries, 2, None), kernels.Rows(torch.zeros(16, 8))
    (batch,) = scan._batch(scan.states[0], no_centre(8))
    products = [torch.zeros(16, 3, dtype=scanned_as)] * 2
    largest = 0.0
    for size in (1.0, 1.001, 0.96, 0.9, 0.949, 3.0, 0.1):
        kernels.scan_tile(batch, rows, products, first_row=0, stats=(0.01 * size, 2 * size, 3 * size))
        least = (batch.arrays["slack_terms"] * np.array([0.01, 2, 3])[:, None, None] * size).sum(0)
        slack, need = batch.arrays["slack"], batch.arrays["need"][:, :5]
        largest = np.maximum(largest, least)
        assert (least <= slack).all()
        assert (slack <= least / 0.94).all()
        assert (largest <= batch.arrays["slack_max"]).all()
        assert (need <= np.maximum(batch.arrays["bar"] - least, -3e38)).all()


def test_parts_that_cancel_before_a_centre_far_away():
    query = torch.nn.functional.normalize(normal(8, 64, seed=1), dim=1) * 1e6
    weights = torch.tensor([1.0, -(1 + 1e-15)], dtype=torch.float64)[None, :, None].expand(1, 2, 8)
    far = torch.nn.functional.normalize(normal(1, 64, seed=2), dim=1).expand(4096, 64) * 9e10
    near = [normal(500, 64, seed=3) * 0.01, normal(4096, 64, seed=4) * 0.02]
    assert_equals_brute_force((query, query.clone()), weights, [near[0], torch.cat([near[1], far])], 5)


def test_one_part_under_several_weightings():
    weights = normal(3, 1, 6, seed=1).double()
    assert_equals_brute_force((normal(6, 20, seed=2),), weights, [normal(900, 20, seed=3)], 7)


def test_a_field_of_packed_records_is_read_where_it_is():
    records = np.zeros(3000, dtype=[("kind", "u1"), ("embedding", "f4", (8,))])
    gallery = records["embedding"]  # 33 bytes from row to row
    gallery[:] = normal(3000, 8, seed=1).numpy()
    query = normal(3, 8, seed=2)
    expected = exact_top_k(query, gallery.copy(), 5)
    for rows in (gallery, prepare_gallery(gallery), [gallery[:2000], gallery[2000:]]):
        assert torch.equal(exact_top_k(query, rows, 5).indices, expected.indices)


def test_torch_s_default_device_is_not_asked():
    query, gallery = normal(3, 8, seed=1), normal(900, 8, seed=2)
    expected = exact_top_k(query, gallery, 5)
    with torch.device("meta"):
        assert torch.equal(exact_top_k(query, gallery, 5).indices, expected.indices)
        assert torch.equal(exact_top_k(query, prepare_gallery(gallery), 5).indices, expected.indices)


def test_what_is_too_large_is_refused():
    wide = torch.zeros(1, 1).expand(2, 2**18 + 1)
    with pytest.raises(CirError, match="262145 dimensions; the search takes at most 262144"):
        exact_top_k(wide, wide, 1)
    with pytest.raises(CirError, match="at most 2147483647 rows, not 2147483648"):
        prepare_gallery(np.broadcast_to(np.zeros((1, 1), np.float16), (2**31, 1)))


@pytest.fixture
def matmul():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_searches_at_once_keep_true_float32_until_the_last_ends(matmul):
    matmul.fp32_precision = "bf16"
    cpu = torch.device("cpu")
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:  # gradients are a setting of the thread
        one, other = ieee_float32(cpu), ieee_float32(cpu)
        first.submit(one.__enter__).result()
        second.submit(other.__enter__).result()
        first.submit(one.__exit__, None, None, None).result()
        assert matmul.fp32_precision == "ieee"
        second.submit(other.__exit__, None, None, None).result()
    assert matmul.fp32_precision == "bf16"


def test_weighted_search_takes_tiny_and_huge_weights_together():
    image, text, gallery = normal(5, 12, seed=1), normal(5, 12, seed=2), normal(800, 12, seed=3)
    weights = {"mixed": (torch.full((5,), 1e12), torch.full((5,), 1e-12)), "image": (torch.ones(5), torch.zeros(5))}
    found = weighted_top_k(image, text, gallery, weights, 6)
    assert torch.equal(found["mixed"].indices, found["image"].indices)
