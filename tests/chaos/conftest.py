"""The S3 server and the fault proxy in front of it, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the programs of this folder import each other by their plain names

from servers import ProxyServer, S3Server


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A SeaweedFS server with an empty bucket."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.process.kill()


@pytest.fixture(scope="session")
def proxy(tmp_path_factory, s3):
    """A fault proxy in front of it."""
    server = ProxyServer(tmp_path_factory.mktemp("proxy"), s3.url)
    server.start()
    yield server
    server.process.kill()
