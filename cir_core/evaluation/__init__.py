"""From a ranking to a score with its protocol, and rankings on disk."""

from cir_core.evaluation.parts import ValueCounts, score_part, total_scores
from cir_core.evaluation.protocol import apply_protocol
from cir_core.evaluation.rankings import load_ranking, save_ranking
from cir_core.evaluation.scoring import EvaluationResult, compare, evaluate, mean_of_results
from cir_core.evaluation.submission import has_test_server, validate_submission, write_submission

__all__ = [
    "EvaluationResult",
    "ValueCounts",
    "apply_protocol",
    "compare",
    "evaluate",
    "has_test_server",
    "load_ranking",
    "mean_of_results",
    "save_ranking",
    "score_part",
    "total_scores",
    "validate_submission",
    "write_submission",
]
