"""The search measurements run on a small gallery and say what they measured."""

from __future__ import annotations

import re

import pytest
import torch

from cir_core.schema import CirError
from jobs.benchmark import BenchmarkConfig
from jobs.benchmark_search import interleaved, measure_search, measure_search_streamed
from jobs.benchmark_search_gpu import measure_search_on

SMALL = {"gallery_rows": 3000, "queries": 5, "dim": 16, "k": 3, "rounds": 2}


@pytest.mark.parametrize("measure", [measure_search, measure_search_streamed])
def test_a_table_and_its_numbers(measure):
    found = measure(BenchmarkConfig.model_validate(SMALL))
    assert "5 queries, 3000 x 16" in found.markdown
    assert found.markdown.count("\n| ") == 1 + len(found.metrics) // 2
    assert all(re.fullmatch(r"[\w/. :-]+", key) for key in found.metrics)  # what MLflow takes
    assert all(value > 0 for value in found.metrics.values())
    assert any(key.startswith(("exact search/", "search of a gallery in storage/")) for key in found.metrics)


def test_every_variant_runs_once_a_round_in_turns():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(spent) for spent in seconds.values()] == [3, 3]


def test_search_on_a_device_is_measured_beside_the_bare_product_and_the_peak():
    found = measure_search_on(BenchmarkConfig.model_validate(SMALL), torch.device("cpu"), side=64)
    assert "5 queries, 3000 x 16" in found.markdown
    assert "same rows in the same order for 5 of 5 queries" in found.markdown
    assert found.markdown.count("\n| ") == 1 + len(found.metrics) // 2
    assert all(re.fullmatch(r"[\w/. :-]+", key) for key in found.metrics)
    assert found.metrics["exact search on a gpu/share of peak"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(CirError, match="no CUDA device"):
        measure_search(BenchmarkConfig.model_validate(SMALL | {"use_gpu": True}))


def test_the_streamed_search_measures_no_gpu():
    with pytest.raises(CirError, match="use_gpu"):
        measure_search_streamed(BenchmarkConfig.model_validate(SMALL | {"use_gpu": True}))
