"""The tables that a retrieval run prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from cir_core.evaluation import compare
from jobs.retrieval_outcomes import Outcome, averaged, by_variant, flat_protocol, groups_of

SCENES_NOTE = "generated data: a smoke signal, not a benchmark result"


def _percent(value: tuple[float, float, float]) -> str:
    return f"{100 * value[0]:.2f} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"


def _title(outcomes: Sequence[Outcome]) -> str:
    first = outcomes[0]
    parts = list(dict.fromkeys(outcome.part.label for outcome in outcomes))
    mean = f", mean over {', '.join(parts)}" if len(parts) > 1 else f" {first.part.label}".rstrip()
    return f"{first.benchmark.name} {first.benchmark.split}{mean}"


def methods_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a method, one column a variant: a group's headline metric with its interval at the reported alpha."""
    headline = outcomes[0].benchmark.headline
    table = _titled(f"{_title(outcomes)}: {headline} in percent [95 % interval]")
    variants = by_variant(outcomes)
    table.add_column("method")
    for label in variants:
        table.add_column(label)
    for method in outcomes[0].chosen:
        cells = []
        for held in variants.values():
            alpha = held[0].chosen[method]
            cells.append(_percent(averaged(held, method)[headline]) + ("" if alpha is None else f" at {alpha:g}"))
        table.add_row(method, *cells)
    return table


def metrics_table(outcomes: Sequence[Outcome], method: str) -> Table:
    """Every metric of one method in percent: a row for each variant and part, and for the mean over parts."""
    alphas = sorted({alpha for outcome in outcomes if (alpha := outcome.chosen[method]) is not None})
    at = f" at alpha {', '.join(f'{alpha:g}' for alpha in alphas)}" if alphas else ""
    table = _titled(f"{_title(outcomes)}: {method}{at}, in percent")
    table.add_column("")
    names = outcomes[0].benchmark.metrics
    for name in names:
        table.add_column(name.replace("mean_recall@5_recall_subset@1", "mean R@5, Rs@1").replace("_", " "))
    for label, held in by_variant(outcomes).items():
        for outcome in held:
            metrics = outcome.best(method).metrics
            table.add_row(f"{label} {outcome.part.label}".strip(), *(f"{100 * metrics[name]:.2f}" for name in names))
        if len(held) > 1:
            means = averaged(held, method)
            table.add_row(f"{label} mean", *(f"{100 * means[name][0]:.2f}" for name in names))
    return table


def comparisons_table(outcomes: Sequence[Outcome], method: str) -> Table:
    """Say what tuning did for `method`, and what `method` does better than the others: paired bootstraps, same queries."""
    variants = by_variant(outcomes)
    last = list(variants)[-1]
    tuned = [outcome.best(method) for outcome in variants[last]]
    pairs = []
    for label in (label for label in variants if label != last):
        pairs.append((f"{method}: {last} - {label}", [outcome.best(method) for outcome in variants[label]]))
    for label in list(variants)[::-1]:
        for rival in (name for name in outcomes[0].chosen if name != method):
            rivals = [outcome.best(rival) for outcome in variants[label]]
            pairs.append((f"{method} {last} - {rival} {label}", rivals))
    headline = outcomes[0].benchmark.headline
    table = _titled(f"differences of {headline} in points, the same queries", show_header=False)
    for name, rivals in pairs:
        found = compare(rivals, tuned, headline)
        interval = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        table.add_row(name, interval, f"better in {100 * found.probability_b_better:.1f} % of resamples")
    return table


def protocol_table(outcomes: Sequence[Outcome], method: str) -> Table:
    """Say what the scores depend on: what is common once, what differs with the encoder or part it belongs to."""
    table = _titled("protocol", show_header=False)
    several = {name: len({getter(item) for item in outcomes}) > 1 for name, getter in _AXES.items()}
    protocols = [(outcome, flat_protocol(outcome, method)) for outcome in outcomes]
    for key in dict.fromkeys(key for _, protocol in protocols for key in protocol):
        told: dict[str, None] = {}
        for outcome, protocol in protocols:
            of = " ".join(getter(outcome) for name, getter in _AXES.items() if several[name])
            told[f"{of}: {protocol.get(key, '')}"] = None
        values = {str(protocol.get(key, "")) for _, protocol in protocols}
        table.add_row(key, values.pop() if len(values) == 1 else "\n".join(told))
    return table


_AXES: dict[str, Callable[[Outcome], str]] = {
    "part": lambda outcome: outcome.part.label,
    "encoder": lambda outcome: outcome.variant.label,
}


def _titled(title: str, *, show_header: bool = True) -> Table:
    return Table(title=title, title_justify="left", min_width=min(len(title) + 4, 130), show_header=show_header)


def print_report(console: Console, outcomes: Sequence[Outcome], *, method: str) -> None:
    """Print every group's scores with their protocol."""
    for held in groups_of(outcomes).values():
        if held[0].results:
            console.print(methods_table(held))
            console.print(metrics_table(held, method))
            differences = comparisons_table(held, method)
            if differences.row_count:
                console.print(differences)
    console.print(protocol_table(outcomes, method))
    note = SCENES_NOTE if outcomes[0].benchmark.name == "scenes" else ""
    console.print(f"{outcomes[0].alpha_source}. {note}", highlight=False)
