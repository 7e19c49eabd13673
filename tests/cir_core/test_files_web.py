"""cir_core.files on a real web server: busy, refusing, breaking off in the middle, with and without ranges."""

import http.server
import io
import random
import re
import tarfile
import threading
from contextlib import contextmanager

import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import HfFileSystem

from cir_core import files, shards
from cir_core.schema import CirError, RefusedError

DATA = random.Random(0).randbytes(3_000_000)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `data`. statuses: the first answers; cuts: bytes of body after which the next transfers break off."""

    data, ranges, sized = DATA, True, True
    statuses: list[int]
    cuts: list[int]
    asked: list[str]

    def do_GET(self):
        span = self.headers.get("Range", "") if self.ranges else ""
        self.asked.append(f"{self.command} {span}".strip())
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            self.send_error(status)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
        start = int(found[1]) if found else 0
        body = self.data[start : int(found[2]) + 1 if found and found[2] else None]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.data)}")
        if self.sized:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(self.data)}"')
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@contextmanager
def web(**settings):
    handler = type("Handler", (Server,), {"statuses": [], "cuts": [], "asked": [], **settings})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/shard.tar?sig=secret", handler
        finally:
            server.shutdown()


def streamed(uri):
    with files.open_stream(uri) as stream:
        return stream.read()


def at_random(uri):
    with files.open_random(uri) as file:
        return file.read()


def ranged(uri):
    return files.read_range(uri, 0, len(DATA))


READS = [files.read_bytes, streamed, at_random, ranged]


@pytest.mark.parametrize("read", READS)
def test_a_busy_server_is_asked_again(read):
    with web(statuses=[503, 429]) as (uri, server):
        assert read(uri) == DATA
        assert len(server.asked) > 2
    with web(statuses=[500] * 99) as (uri, server):
        with files.patience(0.3), pytest.raises(OSError, match=r"/shard\.tar: the server answers 500$"):
            read(uri)
        assert len(server.asked) > 1


@pytest.mark.parametrize("read", [*READS, files.exists, files.size_bytes])
@pytest.mark.parametrize(("status", "told"), [(403, "access refused"), (404, "no such file"), (400, "refuses")])
def test_what_will_not_change_is_told_at_once(read, status, told):
    with web(statuses=[status] * 99) as (uri, server):
        if (read, status) == (files.exists, 404):
            assert not files.exists(uri)
        else:
            with pytest.raises(CirError, match=rf"/shard\.tar: .*{told}") as caught:
                read(uri)
            assert "secret" not in str(caught.value)
        assert len(server.asked) <= 2  # a HEAD may be refused where a GET is not


def test_whether_a_file_is_there_is_not_answered_by_a_busy_server():
    with web(statuses=[503, 503]) as (uri, _):
        assert files.exists(uri)
    with web(statuses=[503, 503]) as (uri, _):
        assert files.size_bytes(uri) == len(DATA)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_cut_in_the_middle_is_read_on(read, ranges):
    with web(cuts=[1_000_000, 1_500_000], ranges=ranges) as (uri, server):
        assert read(uri) == DATA
        gets = [asked for asked in server.asked if asked.startswith("GET")]
        assert len(gets) == 3
        assert all(re.fullmatch(r"GET bytes=[1-9]\d*-\d*", asked) for asked in gets[1:]) == ranges


def test_a_body_of_unknown_size_is_read_to_its_end():
    with web(sized=False) as (uri, _):
        assert streamed(uri) == DATA
        with pytest.raises(CirError, match="tells no size"):
            ranged(uri)


def test_a_stream_is_one_request_and_stops_where_it_is_left():
    with web() as (uri, server):
        assert streamed(uri) == DATA
        assert files.read_bytes(uri, 10) == DATA[:10]
        assert server.asked == ["GET", "GET"]


@pytest.mark.parametrize("ranges", [True, False])
def test_ranges(ranges):
    with web(ranges=ranges) as (uri, _):
        assert files.read_range(uri, 2_000_000, 70_000) == DATA[2_000_000:2_070_000]
        assert files.read_range(uri, len(DATA) - 10, 50) == DATA[-10:]
        with files.open_random(uri) as file:
            file.seek(1_234_567)
            assert file.read(100) == DATA[1_234_567:1_234_667]


@pytest.mark.parametrize("ranges", [True, False])
def test_parquet(ranges):
    sink = io.BytesIO()
    table = pa.table({"n": pa.array(range(50_000))})
    pq.write_table(table, sink)
    with (
        web(data=sink.getvalue(), ranges=ranges, cuts=[0, 500], statuses=[503, 503]) as (uri, _),
        files.open_parquet(uri) as file,
    ):
        assert file.read().equals(table)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_written_again_between_two_parts_is_not_pieced_together(ranges):
    with web(cuts=[1_000_000], ranges=ranges) as (uri, server), files.open_stream(uri) as stream:
        stream.read(1000)
        server.data = DATA[::-1]
        with pytest.raises(CirError, match="written again"):
            stream.read()


def test_rows_of_a_shard_that_breaks_off():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(20):
            for suffix, data in (("jpg", DATA[:50_000]), ("txt", b"one")):
                member = tarfile.TarInfo(f"{number:02d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with web(data=sink.getvalue(), statuses=[503, 503], cuts=[100, 300_000, 0, 300_000]) as (uri, _):
        rows = list(shards.read_shard(uri))
        assert [row.key for row in rows] == [f"{number:02d}" for number in range(20)]
        assert {row.image for row in rows} == {DATA[:50_000]}


def test_answers_to_huggingface_s_client(monkeypatch):
    with web() as (uri, server):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", uri.rpartition("/")[0])
        for status, kind, told in ((403, RefusedError, "access refused"), (404, CirError, "no such file")):
            HfFileSystem.clear_instance_cache()
            server.statuses[:] = [status] * 99
            with pytest.raises(kind, match=rf"x\.tar: {told}"):
                files.read_bytes("hf://datasets/a/b/x.tar")
        server.statuses[:] = [503] * 99
        for read in (files.read_bytes, files.exists):
            HfFileSystem.clear_instance_cache()
            with files.patience(0.1), pytest.raises(OSError, match="the server answers 503"):
                read("hf://datasets/a/b/x.tar")
    HfFileSystem.clear_instance_cache()
    with files.patience(0), pytest.raises(OSError, match=r"hf://.*: ConnectError"):
        files.read_bytes("hf://datasets/a/b/x.tar")
    HfFileSystem.clear_instance_cache()


class Away(MemoryFileSystem):
    """A store whose record of a file fails at first, as those of hf:// and sftp:// may."""

    protocol = "away"
    failures = 0

    def info(self, path, **kwargs):
        if Away.failures:
            Away.failures -= 1
            raise ConnectionResetError("away for a moment")
        return super().info(path, **kwargs)


def test_a_store_that_is_away_is_not_one_without_the_file():
    fsspec.register_implementation("away", Away, clobber=True)
    files.write_bytes("away://folder/a.bin", b"data")
    for read in (files.read_bytes, streamed, at_random, files.exists):
        Away.failures = 1
        assert read("away://folder/a.bin") in (b"data", True)
        assert Away.failures == 0
    with pytest.raises(CirError, match="is a folder"):
        files.read_bytes("away://folder")
