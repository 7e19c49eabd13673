"""A store that refuses: one picture is a reject, credentials that ended are the end of the job."""

import csv
import http.server
import threading

import pytest

from cir_core import files, shards
from cir_core.schema import AccessError, CirError, Reject, SchemeError
from cir_core.shards import Sample, Slice, refusals

NAMES = tuple(f"{number:03}.jpg" for number in range(200))


class FakeS3(http.server.BaseHTTPRequestHandler):
    """Answers every object with its own path; class attributes say which GETs are refused, and how."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        body = self.path.encode()
        status, code = self.server.answers(self.path.rpartition("/")[2])
        if status == 200 and self.command == "GET":
            self.server.read += 1
        if status != 200:
            body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        elif "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = body[first : last + 1]
        self.send_response(206 if status == 200 and self.command == "GET" else status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeS3) as server:
        server.read, server.answers = 0, lambda _: (200, "")
        server.query = f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def folder_slice(store, names=NAMES):
    return Slice(f"s3://bucket/pictures{store.query}", 0, len(names), 0, len(names), files=names)


def list_of(tmp_path, uris):
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["uri", "caption"], *([uri, "c"] for uri in uris)])
    return str(tmp_path / "l.csv")


def expire_after(store, number, status, code):
    store.answers = lambda _: (200, "") if store.read < number else (status, code)


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (403, "AccessDenied")],
)
def test_credentials_that_end_in_the_middle_end_the_job(store, tmp_path, status, code):
    expire_after(store, 150, status, code)
    rows = []
    with pytest.raises(AccessError, match=r"s3://bucket/pictures/\d+\.jpg: "):
        rows.extend(shards.read_slice_rows(folder_slice(store), require_caption=False))
    assert all(isinstance(row, Sample) for row in rows)
    uri = list_of(tmp_path, [f"s3://bucket/other/{name}{store.query}" for name in NAMES])
    (part,) = shards.index_shard(uri).slices
    expire_after(store, store.read + 150, status, code)
    with pytest.raises(AccessError, match=r"s3://bucket/other/\d+\.jpg: "):
        list(shards.read_slice(part))


def test_a_caption_file_refused_for_want_of_credentials_ends_the_job(store):
    part = Slice(f"s3://bucket/pictures{store.query}", 0, 2, 0, 1, files=("a.jpg", "a.txt"))
    store.answers = lambda name: (403, "AccessDenied") if name == "a.txt" else (200, "")
    (row,) = shards.read_slice_rows(part, require_caption=False)
    assert row.reason == "missing"
    expire_after(store, store.read + 1, 400, "ExpiredToken")
    with pytest.raises(AccessError, match=r"a\.txt: "):
        list(shards.read_slice_rows(part, require_caption=False))


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "InvalidRequest"), (404, "NoSuchKey")])
def test_refused_pictures_among_others_are_rejects(store, status, code):
    bad = NAMES[1::2]  # more than MAX_REFUSED
    store.answers = lambda name: (status, code) if name in bad else (200, "")
    files.read_bytes(f"s3://bucket/pictures/{NAMES[0]}{store.query}")
    rows = list(shards.read_slice_rows(folder_slice(store), require_caption=False))
    assert [row.key for row in rows] == list(NAMES)
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["missing"] * len(bad)
    assert [row.key for row in rows if isinstance(row, Reject)] == list(bad)


def test_a_store_that_never_gave_a_picture_is_closed(store):
    store.answers = lambda _: (403, "AccessDenied")
    few, one = NAMES[: refusals.MAX_REFUSED - 1], NAMES[-1:]
    rows = list(shards.read_slice_rows(folder_slice(store, few), require_caption=False))
    assert [row.reason for row in rows] == ["missing"] * len(few)
    with pytest.raises(AccessError, match=r"199\.jpg: .*64 pictures of this store were refused"):
        list(shards.read_slice_rows(folder_slice(store, one), require_caption=False))


def test_hosts_of_the_web_refuse_for_reasons_of_their_own(store, tmp_path):
    store.answers = lambda _: (403, "")
    uri = list_of(tmp_path, [f"http://127.0.0.1:{store.server_port}/{name}" for name in NAMES])
    assert [row.reason for row in shards.read_shard(uri)] == ["missing"] * len(NAMES)


def test_a_scheme_that_nothing_opens_ends_the_job(tmp_path):
    with pytest.raises(SchemeError, match=r"oss://bucket/1\.jpg: cannot open this kind of URI"):
        list(shards.read_shard(list_of(tmp_path, ["oss://bucket/1.jpg"])))
    with pytest.raises(CirError, match="cannot open") as malformed:
        files.filesystem("s3://bucket/x?nothing=1")
    assert not isinstance(malformed.value, SchemeError)
