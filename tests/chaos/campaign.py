"""The fault campaign: real jobs on a real cluster and a real S3 server, hurt at random times, compared row for row.

    make chaos                                                  # at least 100 faults, about half an hour on two cores
    python tests/chaos/campaign.py --short                      # about 3 minutes, in make test
    python tests/chaos/campaign.py --seed 7 --only embed-driver,tune-everything --output /tmp/chaos

It starts servers of its own (S3, fault proxy, MLflow, a Ray head and a second node), writes shards with some dirty rows, runs
each job once without faults, then again and again under faults: SIGKILL of workers, actors, drivers, a node's raylet and the
servers, and what a network does to HTTP (faults.py). A job that gives up is started again with the same command. Every
result must equal the fault-free one, or the exit code is 1. RESULTS.md and RESULTS.json are written to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster" / "local"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from checks import compare_stores, compare_trainings
from lab import Lab
from plans import RUNS, Data, make_data, planned_runs, reference_run, top_up
from processes import ROOT
from report import Campaign
from runs import Outcome, PlannedRun, Run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, victims and delays of all faults (0)")
    parser.add_argument("--faults", type=int, default=100, help="how many faults at least (100); kills count as well")
    parser.add_argument("--short", action="store_true", help="one run under faults, about 3 minutes")
    parser.add_argument("--only", default="", help="names of runs, separated by commas")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder for RESULTS.md and RESULTS.json"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs, and say where they are")
    options = parser.parse_args(arguments)
    known = RUNS[options.short]
    options.only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"--only {unknown[0]}: no such run; there are {', '.join(known)}")
    return options


def carry_out(lab: Lab, planned: PlannedRun, data: Data) -> Outcome:
    """Do one run and compare its result with the fault-free one."""
    print(
        f"{time.strftime('%H:%M:%S')} {planned.name}: {len(planned.kills)} kills, {sum(planned.http.values())} HTTP faults",
        flush=True,
    )
    outcome = Run(lab, planned, lab.home / "logs" / f"{planned.name}.log").carry_out()
    if outcome.exit_codes[-1] == 0:
        compare = compare_stores if planned.job == "embed" else compare_trainings
        found = compare(data.result(planned.job, "reference"), data.result(planned.job, planned.name))
        outcome.check = replace(found, problems=outcome.check.problems + found.problems)
    else:
        outcome.check.problems.append(f"ended with {outcome.exit_codes}")
    check = outcome.check
    print(
        f"  {'equal' if outcome.recovered else 'NOT EQUAL'} after {outcome.seconds:.0f} s, exit codes {outcome.exit_codes}: "
        f"{check.rows} rows, {check.lost} lost, {check.duplicates} duplicate, {outcome.http_counts}",
        *check.problems,
        sep="\n  ",
        flush=True,
    )
    return outcome


def reference(lab: Lab, job: str, data: Data) -> Outcome:
    """Run a job without faults; all the rest is compared with this, so it must have every row."""
    outcome = carry_out(lab, reference_run(data, job), data)
    rows = data.num_rows(job)
    if not outcome.recovered or outcome.check.rows != rows:
        raise SystemExit(
            f"error: {job} without any fault has {outcome.check.rows} of {rows} rows: {outcome.check.problems}"
        )
    return outcome


def carry_out_all(options: argparse.Namespace, lab: Lab, found: Campaign) -> None:
    """Start everything and run everything; `found` grows with each run."""
    lab.start()
    data = make_data(lab, short=options.short)
    for planned in planned_runs(data, options):
        if planned.job not in found.references:
            found.references[planned.job] = reference(lab, planned.job, data)
        found.outcomes.append(carry_out(lab, planned, data))
    for number in range(0 if options.short or options.only else 3):
        missing = options.faults - found.counts().total()
        if missing > 0:
            found.outcomes.append(carry_out(lab, top_up(data, options.seed, number, missing), data))


def verdict(options: argparse.Namespace, found: Campaign) -> list[str]:
    """Return what was not as it must be."""
    wrong = [
        f"{one.name}: {'; '.join(one.check.problems) or 'rows lost or twice'}"
        for one in found.outcomes
        if not one.recovered
    ]
    total = found.counts().total()
    if total < options.faults and not options.short and not options.only:
        wrong.append(f"only {total} faults were done, {options.faults} were asked for")
    return wrong


def write(folder: Path, found: Campaign) -> None:
    """Write RESULTS.md and RESULTS.json, and print the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RESULTS.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    (folder / "RESULTS.md").write_text(found.to_markdown())
    print(f"\n{found.to_markdown()}", flush=True)


def main() -> None:
    """Run the campaign and leave with 0 if everything recovered."""
    options = parse()
    home = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))
    os.environ.setdefault("CIR_RUN_DIR", str(home / "run"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    lab, found = Lab(home), Campaign(options.seed)
    try:
        carry_out_all(options, lab, found)
    finally:
        lab.stop()
        if options.keep:
            print(f"logs: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
        if found.outcomes:  # also of a campaign that was broken off
            write(options.output, found)
    wrong = verdict(options, found)
    print(*[f"FAILED {line}" for line in wrong] or ["everything recovered"], sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
