"""What a retrieval run found: an outcome for every part and encoder, and how outcomes are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cir_core.benchmarks import Benchmark
from cir_core.evaluation import EvaluationResult, load_ranking, mean_of_results
from cir_core.schema import Ranking
from jobs.benchmark_parts import Part
from jobs.gallery_search import Setting
from jobs.models import ModelInfo


@dataclass(frozen=True)
class Variant:
    """One encoder that is compared. label: as people read it."""

    label: str
    info: ModelInfo


@dataclass(frozen=True)
class Outcome:
    """One variant's scores on one part, and the alpha reported for each method.

    benchmark: what was scored: the part's, less what was to be left out. results: empty where answers are not public.
    alpha_source: where the alphas in `chosen` come from. local: the folder below which its files lie until they are published.
    """

    part: Part
    benchmark: Benchmark
    variant: Variant
    results: dict[Setting, EvaluationResult]
    chosen: dict[str, float | None]
    alpha_source: str
    local: str

    @property
    def folder(self) -> str:
        """The part's folder."""
        return self.part.below(self.local)

    def best(self, method: str) -> EvaluationResult:
        """Return a method's result at its reported alpha."""
        return self.results[(method, self.chosen[method])]

    def ranking(self, method: str, *, subset: bool = False) -> Ranking:
        """Read a method's ranking at its reported alpha."""
        name = f"{method}.subset" if subset else method
        return load_ranking(ranking_file(self.local, self.part, self.variant, name))[self.chosen[method]]


def ranking_file(local: str, part: Part, variant: Variant, name: str) -> str:
    """Return where the rankings of a method lie, all its alphas in one file."""
    return f"{part.below(local)}/rankings/{variant.label.replace(' ', '_')}/{name}.parquet"


def groups_of(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes by group, in order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.part.group, []).append(outcome)
    return groups


def by_variant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes by their variant's label, in order."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.variant.label, []).append(outcome)
    return found


def averaged(outcomes: Sequence[Outcome], method: str) -> dict[str, tuple[float, float, float]]:
    """Return every metric of a method at its reported alpha, averaged over a group's parts: (mean, low, high)."""
    results = [outcome.best(method) for outcome in outcomes]
    if len(results) == 1:
        only = results[0]
        return {name: (only.metrics[name], *only.intervals[name]) for name in outcomes[0].benchmark.metrics}
    found = {}
    for name in outcomes[0].benchmark.metrics:
        mean = mean_of_results(results, name)
        found[name] = (mean.mean, mean.low, mean.high)
    return found


def by_part(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Return the outcomes by part, in order."""
    parts: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        parts.setdefault(outcome.part.label, []).append(outcome)
    return list(parts.values())


def flat_protocol(outcome: Outcome, method: str) -> dict[str, object]:
    """Return all that a method's score depends on: the benchmark's protocol, and how the ranking was made."""
    if outcome.results:
        protocol = dict(outcome.best(method).protocol)
        made = protocol.pop("ranking")
    else:
        benchmark = outcome.benchmark
        protocol = {"benchmark": benchmark.name, "split": benchmark.split} | dict(benchmark.protocol)
        made = outcome.ranking(method).protocol
    return protocol | {"alpha_source": outcome.alpha_source} | (dict(made) if isinstance(made, Mapping) else {})
