"""cir_core.files through the fault proxy: with its own patience every operation succeeds, and no byte is wrong."""

import random

import fsspec
import pyarrow.parquet as pq
import pytest

from cir_core import files
from cir_core.files import access
from cir_core.schema import CirError

pytestmark = pytest.mark.slow
DATA = random.Random(0).randbytes(200_000)
# of those that cost no time; each is more than the requests below can use up
QUICK = {"slow_down": 99, "reset_before": 99, "reset_in_body": 99, "truncated": 99, "lost_reply": 99}


@pytest.fixture
def folder(request, s3, proxy, monkeypatch):
    """A folder of the bucket, reached through the proxy by the standard variables."""
    for name, value in {**s3.environment(), "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield f"{s3.bucket_uri}/{request.node.name.partition('[')[0]}"
    proxy.plan({}, rate=0, seed=0)
    forget_clients()


def forget_clients():
    """Clients keep the endpoint that they were made with."""
    access._arrow_filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("seed", [0, 1])
def test_every_operation_succeeds_at_one_fault_in_four_requests(folder, proxy, seed):
    proxy.plan(QUICK, rate=0.25, seed=seed)
    for number in range(6):
        uri, data = files.join(folder, f"{seed}-{number}"), DATA[number:]
        files.write_bytes(uri, data)
        assert files.read_bytes(uri) == data
        assert files.read_range(uri, 1000, 50) == data[1000:1050]
        with files.open_stream(uri) as stream:
            assert stream.read() == data
        assert files.size_bytes(uri) == len(data)
    assert [file.name for file in files.list_files(folder)][-6:] == [f"{seed}-{number}" for number in range(6)]
    assert not files.exists(files.join(folder, "nothing"))
    assert sum(proxy.report()["counts"].values()) >= 8


def test_bursts_are_outlasted(folder, proxy):
    proxy.plan({"burst": 4}, rate=1, seed=0)
    files.write_bytes(files.join(folder, "a"), DATA)
    assert files.read_bytes(files.join(folder, "a")) == DATA
    assert proxy.report()["counts"]["burst"] >= 2


def test_one_writer_wins_although_replies_are_lost(folder, proxy):
    """The write that was done and not acknowledged is repeated, refused by its own first try, and still the winner's."""
    proxy.plan({"lost_reply": 3}, rate=1, seed=0)
    uri = files.join(folder, "manifest.json")
    assert files.create_json(uri, {"writer": 1}) == {"writer": 1}
    assert files.create_json(uri, {"writer": 2}) == {"writer": 1}
    assert proxy.report()["counts"] == {"lost_reply": 3}


def test_a_truncated_parquet_file_is_read_again_and_not_called_damaged(folder, proxy):
    import pyarrow as pa

    uri = files.join(folder, "table.parquet")
    table = pa.table({"n": pa.array(range(50_000))})
    files.write_parquet(uri, table)
    proxy.plan({"truncated": 3, "reset_in_body": 2}, rate=1, seed=0)
    with files.open_parquet(uri) as file:
        assert file.read().equals(table)
    assert sum(proxy.report()["counts"].values()) >= 2
    assert isinstance(file, pq.ParquetFile)


def test_what_is_not_there_is_told_at_once(folder, proxy):
    proxy.plan({"slow_down": 1}, rate=1, seed=0)
    with pytest.raises(CirError, match="no such file"):
        files.read_bytes(files.join(folder, "nothing"))
    assert proxy.report()["requests"] <= 4
