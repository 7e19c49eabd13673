"""The fault proxy between pyarrow's own client and a real S3 server: right bytes or an error, never wrong bytes."""

import random

import pyarrow.fs as pafs
import pytest
from faults import BURST, KINDS
from s3_server import BUCKET

pytestmark = pytest.mark.slow
DATA = random.Random(0).randbytes(300_000)
# What three requests of pyarrow's client survive; more than that is an error, and the product's own retries begin.
SURVIVED = sorted(set(KINDS["GET"]) - {"burst"})


@pytest.fixture(autouse=True)
def quiet(proxy):
    proxy.plan({}, rate=0, seed=0)
    yield
    proxy.plan({}, rate=0, seed=0)


def client_of(s3, url, **changed):
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key, **changed}
    return pafs.S3FileSystem(**keys, region="us-east-1", scheme="http", endpoint_override=url.partition("://")[2])


@pytest.fixture(scope="module")
def direct(s3):
    return client_of(s3, s3.endpoint)


@pytest.fixture
def through(s3, proxy):
    """A new client: one that has met faults keeps what it has learnt of the server."""
    return client_of(s3, proxy.url)


def write(client, name, data):
    with client.open_output_stream(f"{BUCKET}/{name}", compression=None) as stream:
        stream.write(data)


def read(client, name):
    with client.open_input_file(f"{BUCKET}/{name}") as file:
        return file.read_at(len(DATA), 0)


def names(client, folder):
    return sorted(info.base_name for info in client.get_file_info(pafs.FileSelector(f"{BUCKET}/{folder}")))


def test_without_a_plan_it_is_a_plain_proxy(direct, through, proxy):
    odd = "plain/a b+c%25 ü&x=1.bin"
    write(through, odd, DATA)
    write(through, "plain/empty", b"")
    big = DATA * 40  # 12 MB go up in several parts
    write(through, "plain/big", big)
    assert read(direct, odd) == read(through, odd) == DATA
    with through.open_input_stream(f"{BUCKET}/plain/big") as stream:
        assert stream.read() == big
    assert through.get_file_info(f"{BUCKET}/plain/empty").size == 0
    assert names(through, "plain") == names(direct, "plain")
    through.delete_file(f"{BUCKET}/{odd}")
    assert direct.get_file_info(f"{BUCKET}/{odd}").type == pafs.FileType.NotFound
    assert proxy.report()["counts"] == {}
    assert proxy.report()["requests"] > 8


def test_a_wrong_key_is_refused_through_the_proxy(s3, proxy):
    with pytest.raises(OSError, match=r"SIGNATURE|ACCESS_DENIED|Forbidden"):
        names(client_of(s3, proxy.url, secret_key=s3.secret_key[::-1]), "plain")


@pytest.mark.parametrize("kind", SURVIVED)
def test_a_download_survives_one_fault_of_a_kind(kind, direct, through, proxy):
    write(direct, "down", DATA)
    proxy.plan({kind: 1}, rate=1, seed=0)
    assert read(through, "down") == DATA
    report = proxy.report()
    assert (report["counts"], report["left"]) == ({kind: 1}, {})


@pytest.mark.parametrize("kind", sorted(set(KINDS["PUT"]) - {"burst"}))
def test_an_upload_survives_one_fault_of_a_kind(kind, direct, through, proxy):
    proxy.plan({kind: 1}, rate=1, seed=0)
    write(through, f"up-{kind}", DATA)
    assert proxy.report()["counts"] == {kind: 1}
    assert read(direct, f"up-{kind}") == DATA


def test_an_upload_that_has_no_half_leaves_the_fault_for_the_next(direct, through, proxy):
    proxy.plan({"reset_in_body": 1}, rate=1, seed=0)
    through.create_dir(f"{BUCKET}/no-half")  # a PUT without a body
    assert (proxy.report()["counts"], proxy.report()["left"]) == ({}, {"reset_in_body": 1})
    write(through, "half", DATA)
    assert (proxy.report()["counts"], proxy.report()["left"]) == ({"reset_in_body": 1}, {})
    assert read(direct, "half") == DATA


def test_a_listing_survives_faults(direct, through, proxy):
    for number in range(20):
        write(direct, f"listed/{number:02d}", b"x")
    for kind in ("slow_down", "reset_in_body", "truncated", "reset_before"):
        proxy.plan({kind: 1}, rate=1, seed=0)
        assert names(through, "listed") == [f"{number:02d}" for number in range(20)]
        assert proxy.report()["counts"] == {kind: 1}


def test_a_burst_is_more_than_the_client_survives(direct, through, proxy):
    write(direct, "burst", DATA)
    proxy.plan({"burst": 1}, rate=1, seed=0)
    with pytest.raises(OSError, match=r"SLOW_DOWN|503|SlowDown"):
        read(through, "burst")
    report = proxy.report()
    assert report["counts"] == {"burst": 1}
    assert len(report["done"]) == 3 < BURST
    assert [item["number"] for item in report["done"]] == list(range(1, len(report["done"]) + 1))


def test_a_fault_at_every_request_never_gives_wrong_bytes(direct, through, proxy):
    """Many faults of all kinds that take no time: every read is right or an error, every written object whole."""
    quick = {"slow_down": 40, "burst": 10, "reset_before": 40, "reset_in_body": 50, "truncated": 40, "lost_reply": 20}
    write(direct, "many", DATA)
    proxy.plan(quick, rate=0.35, seed=1)
    outcomes = []
    for number in range(15):
        old, new = DATA[number:], DATA[: len(DATA) - number]
        write(direct, f"many-{number}", old)
        try:
            write(through, f"many-{number}", new)
            outcomes.append("written")
            assert read(direct, f"many-{number}") == new
        except OSError:
            outcomes.append("not written")
            assert read(direct, f"many-{number}") in (old, new)
        try:
            assert read(through, "many") == DATA
            outcomes.append("read")
        except OSError:
            outcomes.append("not read")
    assert {"written", "read"} <= set(outcomes)
    assert sum(proxy.report()["counts"].values()) > 15
