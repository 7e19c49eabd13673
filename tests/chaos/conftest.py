"""The S3 server and the fault proxy in front of it, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster" / "local"))  # the programs of these two folders
sys.path.insert(0, str(Path(__file__).parent))  # import each other by their plain names

from fault_proxy import start_proxy
from processes import stop
from s3_server import start_s3


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """The record of the servers of these tests, in a run folder of their own; all are stopped at the end."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIR_RUN_DIR", str(tmp_path_factory.mktemp("run")))
        yield found
        for name in list(found):
            stop(name, found.pop(name))


@pytest.fixture(scope="session")
def s3(records):
    """A SeaweedFS server with an empty bucket."""
    return start_s3(records)


@pytest.fixture(scope="session")
def proxy(records, s3):
    """A fault proxy in front of it."""
    return start_proxy(records, s3.endpoint)
