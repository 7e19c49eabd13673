"""Scores of parts add up to the scores of everything: metric by metric, interval by interval."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.benchmarks import Benchmark
from cir_core.benchmarks.custom import METRICS, metrics_up_to
from cir_core.evaluation import evaluate, score_part, total_scores
from cir_core.metrics import bootstrap_counts, bootstrap_interval
from cir_core.schema import CirError, Query, Ranking

GALLERY = tuple(f"g{n}" for n in range(70))


def problem(seed, num_queries, *, k, decimals=3):
    """Random lists with ties, without each query's reference, and one to three targets a query."""
    rng = np.random.default_rng(seed)
    queries, ids, scores = [], [], []
    for number in range(num_queries):
        order = rng.permutation(len(GALLERY))
        values = np.sort(rng.random(len(GALLERY)).round(decimals))[::-1].astype(np.float32)
        reference, targets = order[-1], rng.choice(order[:-1], rng.integers(1, 4), replace=False)
        queries.append(Query(f"q{number}", GALLERY[reference], "x", tuple(GALLERY[one] for one in targets)))
        ids.append([GALLERY[one] for one in order[:k]])
        scores.append(values[:k])
    made = {"reference": "removed"}
    return queries, Ranking(tuple(query.query_id for query in queries), np.array(ids), np.array(scores), made)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 12), st.sampled_from([1, 3]), st.sampled_from([55, 69])
)
def test_parts_of_any_size_add_up_to_evaluate(seed, num_queries, size, decimals, k):
    queries, ranking = problem(seed, num_queries, k=k, decimals=decimals)
    benchmark = Benchmark(
        name="hand", split="val", queries=tuple(queries), gallery_ids=GALLERY, protocol={"reference": "removed"},
        metrics=METRICS, headline="recall@10",
    )  # fmt: skip
    whole = evaluate(ranking, benchmark, num_resamples=300, seed=5)
    counts, ranks = [], []
    for start in range(0, num_queries, size):
        rows = slice(start, start + size)
        piece = Ranking(ranking.query_ids[rows], ranking.image_ids[rows], ranking.scores[rows])
        table, found = score_part(piece, queries[rows], metrics_up_to(k), len(GALLERY) - 1)
        counts.append(json.loads(json.dumps(found)))  # as they travel
        ranks += zip(
            *(table.column(name).to_pylist() for name in ("query_id", "rank", "pessimistic_rank")), strict=True
        )
    total = total_scores(counts, num_resamples=300, seed=5)
    assert total.keys() == whole.metrics.keys()
    for metric, interval in total.items():
        assert interval.mean == pytest.approx(whole.metrics[metric], abs=1e-15)
        assert (interval.low, interval.high) == whole.intervals[metric]
    columns = (whole.per_query.column(name).to_pylist() for name in ("query_id", "rank", "pessimistic_rank"))
    assert ranks == list(zip(*columns, strict=True))


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=200), st.integers(0, 9))
def test_counted_values_have_the_interval_of_the_values(values, seed):
    counts = {value: values.count(value) for value in (1.0, 0.5, 0.25, 0.0)}
    assert bootstrap_counts(counts, seed=seed, num_resamples=200) == bootstrap_interval(
        values, seed=seed, num_resamples=200
    )


def test_what_a_part_cannot_tell_is_refused():
    queries, ranking = problem(0, 3, k=20)
    with pytest.raises(CirError, match="in another order"):
        score_part(ranking, queries[::-1], ("recall@1",), 69)
    with pytest.raises(CirError, match="recall_subset@1 needs more"):
        score_part(ranking, queries, ("recall_subset@1",), 69)
    with pytest.raises(CirError, match="k = 50"):
        score_part(ranking, queries, ("map@50",), 69)
    with pytest.raises(CirError, match="expected one value per query"):
        bootstrap_counts({})
