"""Metrics equal naive loops, and other people's evaluators on real annotations (folder: CIR_BENCHMARKS)."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core.metrics import (
    average_precision_at_k,
    bootstrap_group_mean,
    bootstrap_interval,
    first_hit_rank,
    paired_bootstrap,
    pessimistic_rank,
    recall_at_k,
    recall_subset_at_k,
)
from cir_core.schema import CirError

IDS = [f"image-{number}" for number in range(12)] + ["é", "a" * 40]


@st.composite
def rankings(draw):
    """Permutations of a small gallery, cut at k and padded with "", with targets and falling scores."""
    num_queries, k = draw(st.integers(1, 5)), draw(st.integers(1, len(IDS)))
    ranked, targets, scores = [], [], []
    for _ in range(num_queries):
        filled = draw(st.integers(0, k))
        ranked.append(draw(st.permutations(IDS))[:filled] + [""] * (k - filled))
        targets.append(tuple(draw(st.permutations(IDS))[: draw(st.integers(1, 5))]))
        row = sorted(draw(st.lists(st.integers(0, 3), min_size=filled, max_size=filled)), reverse=True)
        scores.append(row + [-np.inf] * (k - filled))
    return np.array(ranked, dtype=np.str_), targets, np.array(scores, dtype=np.float32)


def naive_average_precision(ranked, targets, k):
    hits, total = 0, 0.0
    for place, name in enumerate(ranked[:k], start=1):
        if name in targets:
            hits += 1
            total += hits / place
    return total / min(len(targets), k)


def naive_pessimistic(ranked, scores, targets, complete):
    best = next((place for place, name in enumerate(ranked) if name in targets), None)
    if best is None:
        return 0
    level = scores[best]
    rivals = [
        name for name, score in zip(ranked, scores, strict=True) if name and name not in targets and score >= level
    ]
    tied = [n for n, s in zip(ranked, scores, strict=True) if n and n not in targets and s == level]
    last = [score for name, score in zip(ranked, scores, strict=True) if name][-1]
    if tied and last == level and not complete:
        return 0
    return len(rivals) + 1


@given(rankings(), st.data())
def test_recall_precision_and_ranks_equal_naive_loops(case, data):
    ranked, targets, scores = case
    k = data.draw(st.integers(1, ranked.shape[1]))
    rows = list(zip(ranked.tolist(), targets, strict=True))
    assert recall_at_k(ranked, targets, k).tolist() == [float(bool(set(row[:k]) & set(t))) for row, t in rows]
    expected = [naive_average_precision(row, t, k) for row, t in rows]
    np.testing.assert_allclose(average_precision_at_k(ranked, targets, k), expected, rtol=1e-15, atol=0)
    places = [next((row.index(name) + 1 for name in row if name in t), 0) for row, t in rows]
    assert first_hit_rank(ranked, targets).tolist() == places
    for complete in (False, True):
        naive = [naive_pessimistic(r, s, t, complete) for (r, t), s in zip(rows, scores.tolist(), strict=True)]
        assert pessimistic_rank(ranked, scores, targets, complete=complete).tolist() == naive


@given(rankings(), st.data())
def test_subset_recall_equals_ranking_the_subset_alone(case, data):
    ranked, targets, _ = case
    subsets = [tuple(data.draw(st.permutations(IDS))[: data.draw(st.integers(1, 6))]) for _ in targets]
    k = data.draw(st.integers(1, ranked.shape[1]))
    expected = []
    for row, wanted, subset in zip(ranked.tolist(), targets, subsets, strict=True):
        own = [name for name in row if name in subset]
        known = bool(set(own) & set(wanted)) or len(own) >= min(k, len(subset))
        if k > len(subset) or not known:
            with pytest.raises(CirError, match=r"query at position|k ="):
                recall_subset_at_k(ranked, targets, subsets, k)
            return
        expected.append(float(bool(set(own[:k]) & set(wanted))))
    assert recall_subset_at_k(ranked, targets, subsets, k).tolist() == expected


def test_empty_places_take_a_rank_and_are_never_hits():
    ranked = np.array([["", "a"], ["", ""]])
    assert recall_at_k(ranked, [("a",), ("a",)], 1).tolist() == [0.0, 0.0]
    assert first_hit_rank(ranked, [("a",), ("a",)]).tolist() == [2, 0]


def test_a_model_that_scores_everything_alike_has_no_pessimistic_hit():
    ranked = np.array([["a", "b", "c"]])
    same = np.zeros((1, 3), dtype=np.float32)
    assert first_hit_rank(ranked, [("a",)]).tolist() == [1]
    assert pessimistic_rank(ranked, same, [("a",)]).tolist() == [0]
    assert pessimistic_rank(ranked, same, [("a",)], complete=True).tolist() == [3]
    assert pessimistic_rank(ranked, same, [("a", "b", "c")]).tolist() == [1]  # targets do not lose to each other


@pytest.mark.parametrize(
    ("ranked", "targets", "k", "message"),
    [
        ([["a", "b"], ["b", "b"]], [("a",), ("a",)], 1, r"query 'q1': 'b' is listed twice in its ranking"),
        ([["a", "b"], ["a", "b"]], [("a",), ()], 1, r"query 'q1': no targets"),
        ([["a", "b"], ["a", "b"]], [("a",), ("",)], 1, r"query 'q1': no targets, or an empty id"),
        ([["a", "b"], ["a", "b"]], [("a",), ("b", "b")], 1, r"query 'q1': a target is listed twice"),
        ([["a", "b"], ["a", "b"]], [("a",), "b"], 1, r"query 'q1': targets must be a sequence of ids"),
        ([["a", "b"], ["a", "b"]], [("a",), ("b",)], 5, r"k = 5, but .* holds 2 places; rank 3 more"),
        ([["a", "b"], ["a", "b"]], [("a",), ("b",)], 0, r"k must be at least 1"),
        ([["a", "b"]], [("a",), ("b",)], 1, r"expected \[2, k\]"),
    ],
)  # fmt: skip
def test_faults_are_errors_that_name_the_query(ranked, targets, k, message):
    for metric in (recall_at_k, average_precision_at_k):
        with pytest.raises(CirError, match=message):
            metric(np.array(ranked), targets, k, query_ids=("q0", "q1"))


def test_hundred_thousand_queries_are_scored_in_seconds():
    num_queries, k = 100_000, 50
    gallery = np.array([f"gallery-{number:08d}" for number in range(200_000)])
    start = (np.arange(num_queries) * 7919) % gallery.size
    ranked = gallery[(start[:, None] + np.arange(k)) % gallery.size]
    targets = [(str(name),) for name in gallery[(start + np.arange(num_queries) % 100) % gallery.size]]
    begin = time.perf_counter()
    recall, precision = recall_at_k(ranked, targets, 10), average_precision_at_k(ranked, targets, 50)
    assert time.perf_counter() - begin < 30  # about 1 s on one quiet core
    assert recall.mean() == 0.1
    assert precision.mean() == pytest.approx(np.sum(1 / np.arange(1, 51)) / 100, rel=1e-12)


def test_bootstrap_agrees_with_drawing_queries_one_by_one():
    values = np.random.default_rng(1).choice([0.0, 0.25, 0.5, 1.0], size=300, p=[0.5, 0.2, 0.2, 0.1])
    drawn = np.random.default_rng(2).choice(values, size=(20_000, values.size)).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    interval = bootstrap_interval(values, num_resamples=20_000)
    assert interval.mean == values.mean()
    assert interval.low == pytest.approx(low, abs=0.003)
    assert interval.high == pytest.approx(high, abs=0.003)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9), st.integers(0, 1000))
def test_bootstrap_of_hits_is_close_to_the_binomial_interval(rate, seed):
    values = (np.random.default_rng(seed).random(2000) < rate).astype(float)
    interval = bootstrap_interval(values, seed=seed)
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / values.size)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)
    assert interval.low <= interval.mean <= interval.high


def test_bootstrap_resamples_many_distinct_values_in_bounded_parts():
    values = np.random.default_rng(0).random(30_000)  # 30,000 distinct values: several parts
    interval = bootstrap_interval(values, num_resamples=300)
    assert interval.low < 0.5 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(values.size), rel=0.2)


def test_paired_bootstrap_sees_a_gain_that_separate_intervals_hide():
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.5).astype(float)
    b = np.maximum(a, rng.random(400) < 0.05)  # B only ever gains
    result = paired_bootstrap(a, b)
    assert result.difference == pytest.approx(b.mean() - a.mean())
    assert result.low > 0
    assert result.probability_b_better > 0.99
    assert bootstrap_interval(b).low < bootstrap_interval(a).high  # the two intervals overlap
    mirrored = paired_bootstrap(b, a)
    assert mirrored.difference == -result.difference
    assert mirrored.probability_b_better == pytest.approx(1 - result.probability_b_better)
    assert paired_bootstrap(a, a).probability_b_better == 0.5


def test_bootstrap_of_groups_resamples_each_by_itself():
    rng = np.random.default_rng(0)
    groups = [(rng.random(size) < rate).astype(float) for size, rate in ((500, 0.2), (2000, 0.7))]
    interval = bootstrap_group_mean(groups)
    variance = sum(group.var() / group.size for group in groups) / 4
    assert interval.mean == pytest.approx(np.mean([group.mean() for group in groups]))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.06)
    one = bootstrap_interval(groups[0])
    assert bootstrap_group_mean([groups[0]]) == one
    alike = bootstrap_group_mean([groups[0], groups[0]])  # independent draws: the width falls by the root of two
    assert (alike.high - alike.low) / (one.high - one.low) == pytest.approx(1 / np.sqrt(2), rel=0.06)
    for bad, message in (([], "no groups"), ([groups[0], []], "group 1: expected one value per query")):
        with pytest.raises(CirError, match=message):
            bootstrap_group_mean(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "one value per query"),
        (lambda: bootstrap_interval([0.0, float("nan")]), "value nan at position 1"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence must lie between 0 and 1"),
        (lambda: bootstrap_interval([1.0], num_resamples=10), "at least 100"),
        (lambda: paired_bootstrap([1.0], [1.0, 0.0]), "1 values in a, 2 in b"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_use(call, message):
    with pytest.raises(CirError, match=message):
        call()


# --- other people's evaluators, on real annotations ---


@pytest.fixture(scope="module")
def annotations():
    root = os.environ.get("CIR_BENCHMARKS")
    if not root:
        pytest.skip("CIR_BENCHMARKS does not name a folder of benchmark annotations")
    return lambda path: json.loads((Path(root) / path).read_text())


FLOAT32 = 5e-6  # percent: the published evaluators average in float32


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def noise(rng, num_rows):
    return unit(rng.standard_normal((num_rows, 64)).astype(np.float32))


def top(query_QD, gallery_GD, gallery_ids, excluded=None, k=50):
    """Rank by (-score, gallery index)."""
    scores = query_QD @ gallery_GD.T
    if excluded is not None:
        scores[np.arange(len(scores)), excluded] = -np.inf
    return np.array(gallery_ids)[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def test_circo_official_example_submission(annotations):
    queries = annotations("circo/annotations/val.json")
    submission = annotations("circo/submission_examples/submission_val.json")
    ranked = np.array([submission[str(query["id"])] for query in queries]).astype(np.str_)
    targets = [tuple(map(str, query["gt_img_ids"])) for query in queries]
    first = [(str(query["target_img_id"]),) for query in queries]
    means = [round(100 * average_precision_at_k(ranked, targets, k).mean(), 2) for k in (5, 10, 25, 50)]
    recalls = [round(100 * recall_at_k(ranked, first, k).mean(), 2) for k in (5, 10, 25, 50)]
    assert means == [0.49, 0.52, 0.54, 0.60]
    assert recalls == [0.91, 0.91, 1.36, 3.64]


def test_circo_oracle(annotations):
    queries, test = annotations("circo/annotations/val.json"), annotations("circo/annotations/test.json")
    gallery = {query["reference_img_id"] for query in queries + test}
    gallery = sorted(gallery | {name for query in queries for name in query["gt_img_ids"]})
    place = {name: index for index, name in enumerate(gallery)}
    rng = np.random.default_rng(2)
    gallery_GD = noise(rng, len(gallery))
    toward = np.stack([gallery_GD[[place[name] for name in query["gt_img_ids"]]].mean(axis=0) for query in queries])
    ranked = top(
        unit(np.float32(0.35) * toward + noise(rng, len(queries))),
        gallery_GD,
        [str(name) for name in gallery],
    )
    oracle = annotations("oracle_metrics.json")["circo_val_seed2_synthetic_gallery(1903)"]
    assert len(gallery) == 1903
    targets = [tuple(map(str, query["gt_img_ids"])) for query in queries]
    first = [(str(query["target_img_id"]),) for query in queries]
    for k in (5, 10, 25, 50):
        assert 100 * average_precision_at_k(ranked, targets, k).mean() == pytest.approx(oracle[f"mAP@{k}"], abs=FLOAT32)
        assert 100 * recall_at_k(ranked, first, k).mean() == pytest.approx(oracle[f"recall@{k}"], abs=FLOAT32)


def test_cirr_oracle(annotations):
    queries = annotations("cirr/captions/cap.rc2.val.json")
    gallery = list(annotations("cirr/image_splits/split.rc2.val.json"))
    place = {name: index for index, name in enumerate(gallery)}
    rng = np.random.default_rng(0)
    gallery_GD = noise(rng, len(gallery))
    target = np.array([place[query["target_hard"]] for query in queries])
    query_QD = unit(np.float32(0.25) * gallery_GD[target] + noise(rng, len(queries)))
    excluded = [place[query["reference"]] for query in queries]
    targets = [(query["target_hard"],) for query in queries]
    groups = [tuple(query["img_set"]["members"]) for query in queries]
    ranked = top(query_QD, gallery_GD, gallery, excluded)
    oracle = annotations("oracle_metrics.json")["cirr_val_seed0_q=norm(0.25*target+noise)"]
    for k in (1, 5, 10, 50):
        assert 100 * recall_at_k(ranked, targets, k).mean() == pytest.approx(oracle[f"recall@{k}"], abs=FLOAT32)
    pairs = zip(groups, queries, strict=True)
    members = [[name for name in group if name != query["reference"]] for group, query in pairs]
    alone = np.concatenate(
        [
            top(query_QD[row : row + 1], gallery_GD[[place[name] for name in names]], names)
            for row, names in enumerate(members)
        ]
    )
    for k in (1, 2, 3):
        per_query = recall_subset_at_k(alone, targets, groups, k)
        assert 100 * per_query.mean() == pytest.approx(oracle[f"group_recall@{k}"], abs=FLOAT32)
        whole = top(query_QD[:100], gallery_GD, gallery, excluded[:100], k=len(gallery) - 1)
        assert recall_subset_at_k(whole, targets[:100], groups[:100], k).tolist() == per_query[:100].tolist()


@pytest.mark.parametrize(
    ("category", "sizes"), [("dress", (3817, 2628)), ("shirt", (6346, 3089)), ("toptee", (5373, 2902))]
)
def test_fashioniq_oracle(annotations, category, sizes):
    queries = annotations(f"fashioniq/captions/cap.{category}.val.json")
    gallery = annotations(f"fashioniq/image_splits/split.{category}.val.json")
    place = {name: index for index, name in enumerate(gallery)}
    rng = np.random.default_rng(1)
    gallery_GD = noise(rng, len(gallery))
    target = np.array([place[query["target"]] for query in queries])
    query_QD = unit(np.float32(0.25) * gallery_GD[target] + noise(rng, len(queries)))
    used = {query[side] for query in queries for side in ("target", "candidate")}
    small = [name for name in gallery if name in used]
    oracle = annotations("oracle_metrics.json")
    for name, ids in ((f"original_gallery({sizes[0]})", gallery), (f"VAL_gallery({sizes[1]})", small)):
        ranked = top(query_QD, gallery_GD[[place[image] for image in ids]], ids)
        for k in (1, 5, 10, 50):
            value = 100 * recall_at_k(ranked, [(query["target"],) for query in queries], k).mean()
            assert value == pytest.approx(oracle[f"fiq_{category}_val_seed1_{name}"][f"Recall@{k}"], abs=FLOAT32)
