"""Which library multiplies for the scan, and that both stay within the bound that the scan takes for granted."""

from __future__ import annotations

import pytest
import torch

from cir_core.search import exact_top_k, products
from cir_core.search.scan import ieee_float32

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(params=["none", "bf16", "tf32"])
def precision(request):
    """What the process has asked of its float32 products."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, request.param
    yield request.param
    settings.fp32_precision = before


@needs_onednn
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4096, 7, 33), (100, 256, 512), (37, 1, 2047)], ids=str)
def test_products_are_within_the_bound_of_float32_sums(monkeypatch, shape, onednn):
    monkeypatch.setattr(products, "fast_onednn", lambda: onednn)
    num_rows, num_queries, dim = shape
    generator = torch.Generator().manual_seed(dim)
    rows, vectors = (torch.randn(number, dim, generator=generator) for number in (num_rows, num_queries))
    with ieee_float32(torch.device("cpu")):
        right = products.right_operand(vectors)
        found = products.multiply(rows, right, torch.empty(num_rows, num_queries))
    assert right.is_mkldnn == onednn
    assert found.is_contiguous()
    n = dim * 2.0**-24
    bound = n / (1 - n) * rows.double().norm(dim=1)[:, None] * vectors.double().norm(dim=1)
    assert bool(((found - rows.double() @ vectors.double().T).abs() <= bound).all())


@needs_onednn
def test_onednn_is_not_used_where_it_rounds_what_it_multiplies(monkeypatch):
    def rounded(rows, right):
        return rows.bfloat16().float() @ right.to_dense().bfloat16().float().T

    monkeypatch.setattr(products, "_shortest", lambda calls: [1.0, 0.5])
    assert products.fast_onednn.__wrapped__()
    monkeypatch.setattr(products, "_linear", rounded)
    assert not products.fast_onednn.__wrapped__()


@pytest.mark.parametrize("available", [True, False])
def test_the_faster_is_used_and_nothing_where_there_is_no_onednn(monkeypatch, available):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    monkeypatch.setattr(products, "_shortest", lambda calls: [call() for call in calls] and [1.0, 0.95])
    assert not products.fast_onednn.__wrapped__()
    assert not products.fast_bfloat16.__wrapped__()
    assert exact_top_k(torch.eye(8)[:3], torch.eye(8), 1).indices.tolist() == [[0], [1], [2]]
