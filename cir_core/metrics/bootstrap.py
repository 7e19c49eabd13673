"""How sure a mean over queries is: percentile bootstrap intervals and paired comparisons. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cir_core.schema import CirError

Floats = npt.NDArray[np.float64]

_CELLS_AT_ONCE = 4_000_000  # bounds the resampled counts to 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval [low, high] around the mean of the per-query values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """B against A on the same queries: mean(B - A), its interval, and how often B wins when resampled."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    probability_b_better: float
    num_queries: int


def bootstrap_interval(
    per_query: npt.ArrayLike, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean and its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    per_query: float[Q], finite. The same seed gives the same interval. It speaks of the choice of queries
    only, not of the training run's own randomness. Raises CirError for no queries, values that are not
    finite, a confidence outside (0, 1) or fewer than 100 resamples.

    >>> bootstrap_interval([1.0] * 30 + [0.0] * 70)
    Interval(mean=0.3, low=0.21, high=0.39)
    """
    values = _checked_values(per_query, "per_query")
    means = _resampled_means(values, confidence=confidence, num_resamples=num_resamples, seed=seed)
    low, high = _percentiles(means, confidence)
    return Interval(float(values.mean()), low, high)


def bootstrap_counts(
    counts: Mapping[float, int], *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return what `bootstrap_interval` returns for values that were only counted: {value: number of queries}.

    So the values of many queries need not be gathered in one place: counts of parts add up.

    >>> bootstrap_counts({1.0: 30, 0.0: 70})
    Interval(mean=0.3, low=0.21, high=0.39)
    """
    values = sorted(value for value, number in counts.items() if number)
    distinct, numbers = _checked_values(values, "counts"), np.array([counts[value] for value in values])
    means = _resampled_counts(distinct, numbers, confidence=confidence, num_resamples=num_resamples, seed=seed)
    low, high = _percentiles(means, confidence)
    return Interval(math.fsum(distinct * numbers) / int(numbers.sum()), low, high)


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare B with A on the same queries in the same order (paired bootstrap; Koehn, EMNLP 2004).

    a, b: float[Q], finite. `probability_b_better` is the share of resampled query sets on which mean(B) >
    mean(A), a draw counting one half. Raises CirError as `bootstrap_interval` does, and for lengths that
    differ.

    >>> result = paired_bootstrap([0, 0, 1, 0] * 25, [1, 0, 1, 0] * 25)
    >>> result.difference, result.probability_b_better
    (0.25, 1.0)
    """
    return paired_group_bootstrap([a], [b], confidence=confidence, num_resamples=num_resamples, seed=seed)


def paired_group_bootstrap(
    groups_a: Sequence[npt.ArrayLike],
    groups_b: Sequence[npt.ArrayLike],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare the unweighted means of several groups' means, as `bootstrap_group_mean` gives them, query by query.

    groups_a, groups_b: as many float[Q] each; group g of A and of B hold the same queries in the same order, and are
    resampled together. Raises CirError as `paired_bootstrap` does, and for no groups or unequal numbers of them.
    """
    if not groups_a or len(groups_a) != len(groups_b):
        raise CirError(f"paired bootstrap: {len(groups_a)} groups in a, {len(groups_b)} in b; pair the groups")
    all_a = [_checked_values(values, f"a, group {place}") for place, values in enumerate(groups_a)]
    all_b = [_checked_values(values, f"b, group {place}") for place, values in enumerate(groups_b)]
    for a, b in zip(all_a, all_b, strict=True):
        if a.shape != b.shape:
            raise CirError(f"paired bootstrap: {a.size} values in a, {b.size} in b; pair the queries")
    gains = [b - a for a, b in zip(all_a, all_b, strict=True)]
    drawn = [
        _resampled_means(gain, confidence=confidence, num_resamples=num_resamples, seed=seed + place)
        for place, gain in enumerate(gains)
    ]
    means = np.mean(drawn, axis=0)
    low, high = _percentiles(means, confidence)
    return PairedComparison(
        mean_a=float(np.mean([a.mean() for a in all_a])),
        mean_b=float(np.mean([b.mean() for b in all_b])),
        difference=float(np.mean([gain.mean() for gain in gains])),
        low=low,
        high=high,
        probability_b_better=float(np.mean(means > 0) + 0.5 * np.mean(means == 0)),
        num_queries=sum(gain.size for gain in gains),
    )


def bootstrap_group_mean(
    groups: Sequence[npt.ArrayLike], *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the unweighted mean of the groups' means, and its interval: every group is resampled by itself.

    groups: float[Q] each, finite, of any lengths (FashionIQ's categories, GeneCIS's tasks). With one group
    this is `bootstrap_interval`. Raises CirError as that does, and for no groups.

    >>> bootstrap_group_mean([[1.0, 1.0, 1.0], [0.0]]).mean
    0.5
    """
    if not groups:
        raise CirError("bootstrap_group_mean: no groups")
    arrays = [_checked_values(group, f"group {place}") for place, group in enumerate(groups)]
    parts = [
        _resampled_means(array, confidence=confidence, num_resamples=num_resamples, seed=seed + place)
        for place, array in enumerate(arrays)
    ]
    low, high = _percentiles(np.mean(parts, axis=0), confidence)
    return Interval(float(np.mean([array.mean() for array in arrays])), low, high)


def _resampled_means(values: Floats, *, confidence: float, num_resamples: int, seed: int) -> Floats:
    """Means of query sets drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    return _resampled_counts(distinct, counts, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _resampled_counts(
    distinct: Floats, counts: npt.NDArray[np.int64], *, confidence: float, num_resamples: int, seed: int
) -> Floats:
    """Means of query sets drawn with replacement, from how often each distinct value occurs.

    Drawing Q queries and counting how often each distinct value came up is one multinomial draw, so a metric
    with few distinct values (recall has two) costs two numbers a resample, whatever Q is. The distribution is
    the same.
    """
    if not 0 < confidence < 1:
        raise CirError(f"confidence must lie between 0 and 1, not {confidence}")
    if num_resamples < 100:
        raise CirError(f"num_resamples must be at least 100, not {num_resamples}")
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS_AT_ONCE // distinct.size)
    parts = [
        rng.multinomial(total, counts / total, size=min(rows, num_resamples - start)) @ distinct
        for start in range(0, num_resamples, rows)
    ]
    return np.concatenate(parts) / total


def _percentiles(means: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked_values(values: npt.ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise CirError(f"{what}: expected one value per query, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise CirError(f"{what}: value {array[~np.isfinite(array)][0]} at position {np.argmin(np.isfinite(array))}")
    return array
