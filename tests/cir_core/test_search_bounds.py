"""Where the error bound of the scan is tight, and memory that is laid out oddly: against brute force, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cir_core.schema import CirError
from cir_core.search import TopK, exact_top_k, prepare_gallery, weighted_top_k
from cir_core.search.queries import LinearQueries
from cir_core.search.scan import ieee_float32
from cir_core.search.single_pass import gallery_scan, one_pass
from cir_core.search.top_k import torch_pair_dots


@pytest.fixture(params=[torch.bfloat16, torch.float32, "as on a GPU"], ids=str, autouse=True)
def scanned_as(request, monkeypatch):
    dtype = request.param if isinstance(request.param, torch.dtype) else torch.bfloat16
    for module in ("compiled_scan", "prepared"):
        monkeypatch.setattr(f"cir_core.search.{module}.scan_dtype", lambda: dtype)
    monkeypatch.setattr("cir_core.search.single_pass.MIN_BLOCK_ROWS", 1)  # blocks stay apart
    if request.param == "as on a GPU":
        for module in ("single_pass", "prepared"):
            monkeypatch.setattr(f"cir_core.search.{module}.has_fast_bfloat16", lambda device: True)
        monkeypatch.setattr("cir_core.search.device_scan._SEED_ROWS", 300)


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


@pytest.mark.parametrize("seed", range(40))
def test_products_that_only_their_storage_rounds(seed):
    # Two dimensions, all numbers exact in bfloat16, a mean of zero: nothing else widens the bound.
    image, text, gallery = (normal(n, 2, seed=10 * seed + i).bfloat16().float() for i, n in enumerate((20, 20, 2000)))
    weights = normal(2, 2, 20, seed=10 * seed + 3).double()
    assert_equals_brute_force((image, text), weights, list(torch.cat([gallery, -gallery]).split(500)), 3)


@pytest.mark.parametrize("weight", [1e12, 1e-12, 1e-37, 1e-40, 1e-44, 1e-50])
def test_weights_that_float32_cannot_hold(weight):
    image, text, gallery = (
        torch.nn.functional.normalize(normal(n, 32, seed=i), dim=1) * 9e11 for i, n in enumerate((4, 4, 3000))
    )
    weights = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * weight
    assert_equals_brute_force((image, text), weights, list(gallery.split(500)), 5)


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
