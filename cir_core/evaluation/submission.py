"""Files for a benchmark's test server. No benchmark known here has one: both functions refuse and say so."""

from __future__ import annotations

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.schema import CirError, Ranking


def write_submission(ranking: Ranking, benchmark: Benchmark, path: str) -> None:
    """Write the file that the benchmark's test server takes; CirError where it has no test server."""
    raise CirError(
        f"{benchmark}: has no test server, so {files.redact(path)} was not written; score its "
        f"{len(ranking.query_ids)} queries with evaluate()"
    )


def validate_submission(path: str, benchmark: Benchmark) -> list[str]:
    """Return what the test server would refuse about a file; CirError where it has no test server."""
    raise CirError(f"{benchmark}: has no test server, so {files.redact(path)} cannot be a submission to it")
