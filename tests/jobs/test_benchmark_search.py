"""The search measurements run on a small gallery and say what they measured."""

from __future__ import annotations

import re

import pytest

from cir_core.schema import CirError
from jobs.benchmark import BenchmarkConfig
from jobs.benchmark_search import interleaved, measure_search, measure_search_streamed

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


def test_it_measures_no_gpu():
    with pytest.raises(CirError, match="use_gpu"):
        measure_search(BenchmarkConfig.model_validate(SMALL | {"use_gpu": True}))
