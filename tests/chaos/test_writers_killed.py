"""The commit protocol of a store alone: two writers of the same store at once, killed at random times, on S3 under faults."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import compare_stores

from cir_core import files
from cir_core.embedding_store import EmbeddingStore

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]
PARTS, ROWS = 9, 40
# What embed.py does with a store, without Ray and a model: go on with what is not finished, commit at the end.
WRITER = f"""
import sys
import numpy as np
from cir_core.embedding_store import EmbeddingWriter, StoreSpec
from cir_core.schema import Reject

spec = StoreSpec("m", "w", "", "", "", "", "p", 16, "float32", "listing", "fp32")
writer = EmbeddingWriter(sys.argv[1], spec)
print("begun", flush=True)
order = [number for number in range({PARTS}) if number not in writer.finished_parts()]
np.random.default_rng(int(sys.argv[2])).shuffle(order)
for number in [] if writer.committed else order:
    rng = np.random.default_rng(number)
    vectors = rng.normal(size=({ROWS}, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    writer.write_part(
        number, [f"{{number}}-{{row}}" for row in range({ROWS})], vectors,
        columns={{"caption": [f"row {{row}}" for row in range({ROWS})]}},
        rejects=[Reject("shard", f"{{number}}-bad", "decode", "cut")] if number % 3 == 0 else [],
    )
parts = writer.finished_parts()
if not writer.committed:
    parts = writer.drop_duplicates(parts)
    writer.commit(rows_in={PARTS * ROWS + PARTS // 3}, parts=parts.values(), check_unique_ids=False)
"""


def environment(s3, endpoint):
    return {**os.environ, **s3.environment(), "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": str(ROOT)}


def start(uri, seed, variables):
    command = [sys.executable, "-c", WRITER, uri, str(seed)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(writer):
    _, complaints = writer.communicate(timeout=300)
    return writer.returncode, complaints


def kill_some_time_after_it_begins(writer, rng):
    """Returns whether the kill hit a living process."""
    writer.stdout.readline()
    time.sleep(rng.uniform(0, 1.0))
    alive = writer.poll() is None
    writer.kill()
    writer.communicate()
    return alive


@pytest.mark.timeout(900)
def test_writers_that_are_killed_leave_the_store_of_one_that_is_not(s3, proxy, monkeypatch):
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    expected, found = f"{s3.bucket_uri}/writers/expected", f"{s3.bucket_uri}/writers/found"
    assert finish(start(expected, 0, environment(s3, s3.endpoint))) == (0, "")

    rng, hit = random.Random(0), 0
    for attempt in range(5):
        proxy.plan(
            {"slow_down": 3, "burst": 1, "reset_before": 3, "lost_reply": 3, "reset_in_body": 2}, rate=0.1, seed=attempt
        )
        pair = [start(found, 2 * attempt + number, environment(s3, proxy.url)) for number in range(2)]
        hit += sum(kill_some_time_after_it_begins(writer, rng) for writer in pair)
        if files.exists(f"{found}/manifest.json"):
            break
        assert not compare_stores(expected, found).ok  # a store that is not committed does not open
    assert hit >= 2

    last = [start(found, 100 + number, environment(s3, proxy.url)) for number in range(2)]
    codes = [finish(writer) for writer in last]
    proxy.plan({}, rate=0, seed=0)
    assert 0 in [code for code, _ in codes], codes
    for code, complaints in codes:  # the other one may find the store committed in the middle of a part
        assert code == 0 or "is committed" in complaints, complaints
    check = compare_stores(expected, found)
    assert check.ok, check.problems
    assert EmbeddingStore.open(found).num_rows == PARTS * ROWS
