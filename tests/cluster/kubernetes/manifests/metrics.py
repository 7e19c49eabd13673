"""The metrics that exist: those that our jobs declare, and Ray's own; and those that a query in PromQL names."""

from __future__ import annotations

import ast
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ray
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from jobs.progress import StageMetrics, UnitGauge

ROOT = Path(__file__).resolve().parents[4]
STAGE_METHODS = {"stage", "measured", "took"}
_WORDS = {"sum", "by", "rate", "increase", "unless", "on", "and", "or", "avg", "max", "deriv", "delta", "offset"}


@cache
def _calls() -> tuple[ast.Call, ...]:
    files = sorted((ROOT / "jobs").glob("*.py"))
    return tuple(node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))


def _texts(call: ast.Call) -> list[str]:
    return [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]


def _named(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def ours() -> set[str]:
    """Return the names on /metrics of what the jobs declare: `ray_` before all, `_total` after counters."""
    found = {"ray_cir_storage_retries_total"}  # count_storage_retries
    for call in _calls():
        if _named(call) == "StageMetrics":
            made = StageMetrics(*_texts(call))
            found |= {f"ray_{one.info['name']}_total" for one in (*made._counters.values(), made._stages)}
        elif _named(call) == "UnitGauge":
            found.add(f"ray_{UnitGauge(*_texts(call))._gauge.info['name']}")
    return found


def stages() -> set[str]:
    """Return the values of the label `stage`: what the jobs measure."""
    return {text for call in _calls() if _named(call) in STAGE_METHODS for text in _texts(call)}


def is_rays(name: str) -> bool:
    """Return whether this version of Ray has the metric: a gauge of its agents, or a name in its raylet's program."""
    bare = name.removeprefix("ray_")
    if bare in METRICS_GAUGES:
        return True
    program = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return any(text.find(b"\0" + one.encode() + b"\0") >= 0 for one in {bare, bare.removesuffix("_total")})


def names(query: str) -> Iterator[str]:
    """Yield the metrics that a query names, by its text."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|\b(by|on|group_left|group_right)\s*\([^)]*\)", " ", query)
    for word in re.findall(r"\b[a-z_][a-z_0-9]*\b(?!\s*\()", bare):
        if word not in _WORDS and not re.fullmatch(r"e\d+|\d+[smh]|x|m", word):
            yield word
