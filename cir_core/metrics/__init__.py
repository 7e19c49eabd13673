"""Retrieval metrics and their uncertainty: ids in, one number per query out; the mean is the score."""

from cir_core.metrics.bootstrap import (
    Interval,
    PairedComparison,
    bootstrap_counts,
    bootstrap_group_mean,
    bootstrap_interval,
    paired_bootstrap,
    paired_group_bootstrap,
)
from cir_core.metrics.retrieval import (
    Floats,
    average_precision_at_k,
    first_hit_rank,
    hits,
    pessimistic_rank,
    recall_at_k,
    recall_subset_at_k,
    set_recall_at_k,
    soft_recall_at_k,
)

__all__ = [
    "Floats",
    "Interval",
    "PairedComparison",
    "average_precision_at_k",
    "bootstrap_counts",
    "bootstrap_group_mean",
    "bootstrap_interval",
    "first_hit_rank",
    "hits",
    "paired_bootstrap",
    "paired_group_bootstrap",
    "pessimistic_rank",
    "recall_at_k",
    "recall_subset_at_k",
    "set_recall_at_k",
    "soft_recall_at_k",
]
