"""The short campaign: a real cluster, a real S3 server, real kills; nothing lost, nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # three minutes
CAMPAIGN = Path(__file__).with_name("campaign.py")


def test_the_short_campaign_loses_nothing_and_repeats_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--short", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "RESULTS.json").read_text())
    for kind, least in {
        "decode_worker": 2,
        "encode_actor": 1,
        "slow_down": 2,
        "reset_before": 1,
        "truncated": 1,
    }.items():
        assert found["faults"].get(kind, 0) >= least, found["faults"]
    assert sum(found["faults"].values()) >= 15
    for run in found["runs"]:
        assert run["recovered"]
        assert (run["check"]["lost"], run["check"]["duplicates"]) == (0, 0)
        assert run["check"]["rows"] > 1000
    assert "kill -9 decode worker" in (tmp_path / "RESULTS.md").read_text()
