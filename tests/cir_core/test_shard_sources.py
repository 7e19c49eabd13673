"""Where images come from: lists of URIs against a naive reading, lists of shards, globs, prefixes, the web."""

import csv
import glob
import gzip
import http.server
import io
import itertools
import os
import threading
import uuid
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core import files, shards
from cir_core.schema import CirError, Reject
from cir_core.shards import Link, Sample
from cir_core.shards.fetch import in_order, resolve
from cir_core.shards.model import UnusableError

JPEG = b"\xff\xd8 stands for an image; shards never decode"


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path)


# ---- lists of image URIs against a naive reading

TEXT = st.text(st.sampled_from('ab,"\n é\r\n'), max_size=6)
URIS = st.sampled_from(
    ["1.jpg", "2.jpg", "sub/3.jpg", "gone.jpg", "empty.jpg", "https://host/x.jpg?sig=s", "", " ", "x\0y"]
)
ROWS = st.lists(st.tuples(URIS, st.sampled_from(["k1", "k2", "k3", "k4", "k5", ""]), TEXT), max_size=25)


def naive_links(rows, list_folder, has_key, require_caption=False):
    """(key, uri, caption) or a reason for each row, by a plain loop."""
    out, seen = [], set()
    for uri, key, caption in rows:
        uri = uri.strip()
        key = key if has_key else uri.partition("?")[0]
        if not uri:
            out.append("missing_uri")
        elif "\0" in uri:
            out.append("unsafe_uri")
        elif not key:
            out.append("missing_key")
        elif caption is None and require_caption:
            out.append("missing_caption")
        elif key in seen:
            out.append("duplicate_key")
        else:
            seen.add(key)
            out.append((key, uri if "://" in uri else f"{list_folder}/{uri}", caption))
    return out


def flat(verdicts):
    return [v.reason if isinstance(v, Reject) else (v.key, v.uri, v.caption) for v in verdicts]


def write_csv(uri, header, rows, *, end="\n", quoting=csv.QUOTE_MINIMAL, blank=False):
    sink = io.StringIO()
    if any("\r" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # Python's writer leaves a lone carriage return unquoted
    writer = csv.writer(sink, lineterminator=end, quoting=quoting)
    for row in [header, *rows]:
        writer.writerow(row)
        if blank:
            sink.write(end)
    files.write_bytes(uri, sink.getvalue().encode())


def write_parquet(uri, header, rows, *, row_group_size):
    table = pa.table({name: pa.array([row[n] for row in rows], pa.string()) for n, name in enumerate(header)})
    files.write_parquet(uri, table, row_group_size=row_group_size)


@settings(max_examples=100, deadline=None)
@given(
    rows=ROWS,
    slice_rows=st.integers(1, 7),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank=st.booleans(),
    has_key=st.booleans(),
    remote=st.booleans(),
)
def test_csv_lists_match_the_naive_reading(rows, slice_rows, end, quoting, blank, has_key, remote, tmp_path_factory):
    folder = "memory://csv" if remote else str(tmp_path_factory.getbasetemp())
    uri = f"{folder}/list.csv"
    rows = [(u, k, c) for u, k, c in rows if has_key or u or c]  # a row of nothing is a blank line
    header = ["caption", "uri", *(["key"] if has_key else [])]
    write_csv(
        uri, header, [[c, u, *([k] if has_key else [])] for u, k, c in rows], end=end, quoting=quoting, blank=blank
    )
    expected = naive_links([(u, k, c or None) for u, k, c in rows], folder, has_key)
    check_cuts(uri, expected, slice_rows)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, slice_rows=st.integers(1, 7), row_group_size=st.integers(1, 9), has_key=st.booleans())
def test_parquet_lists_match_the_naive_reading(rows, slice_rows, row_group_size, has_key, tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp())
    uri = f"{folder}/list.parquet"
    rows = [(u or None, k or None, c or None) for u, k, c in rows]
    header = ["URL", "TEXT", *(["id"] if has_key else [])]
    write_parquet(uri, header, [(u, c, k) for u, k, c in rows], row_group_size=row_group_size)
    expected = naive_links([(u or "", k or "", c) for u, k, c in rows], folder, has_key)
    check_cuts(uri, expected, slice_rows)


def check_cuts(uri, expected, slice_rows):
    assert shards.is_uri_list(uri)
    parts = shards.cut_uri_list(uri, slice_rows)
    assert [part.num_rows for part in parts[:-1]] == [slice_rows] * (len(parts) - 1)
    assert sum(part.num_rows for part in parts) == len(expected)
    for before, after in itertools.pairwise(parts):
        assert before.offset + before.length <= after.offset
        assert before.first_row + before.num_rows == after.first_row
    whole = flat(verdict for part in shards.cut_uri_list(uri) for verdict in shards.read_links(part))
    assert whole == expected
    for part in reversed(parts):  # in any order, each alone
        got = flat(shards.read_links(part))
        there = expected[part.first_row : part.first_row + part.num_rows]
        assert len(got) == part.num_rows
        assert [g for g, e in zip(got, there, strict=True) if e != "duplicate_key"] == [
            e for e in there if e != "duplicate_key"
        ]


@settings(max_examples=50, deadline=None)
@given(
    rows=ROWS, slice_rows=st.integers(1, 6), suffix=st.sampled_from(["csv", "parquet"]), require_caption=st.booleans()
)
def test_a_list_reads_the_same_whole_and_in_slices(rows, slice_rows, suffix, require_caption, tmp_path_factory):
    folder = f"memory://{uuid.uuid4().hex}" if slice_rows % 2 else str(tmp_path_factory.mktemp("l"))
    stored = {"1.jpg": JPEG, "2.jpg": b"two", "sub/3.jpg": b"three", "empty.jpg": b""}
    for name, data in stored.items():
        files.write_bytes(f"{folder}/{name}", data)
    rows = [("gone.jpg" if "host" in u else u, k, c) for u, k, c in rows]
    uri = f"{folder}/list.{suffix}"
    if suffix == "csv":
        write_csv(uri, ["image_uri", "key", "txt"], rows)
    else:
        write_parquet(uri, ["image_uri", "key", "txt"], [(u, k, c or None) for u, k, c in rows], row_group_size=4)
    expected = naive_links([(u, k, c or None) for u, k, c in rows], folder, True, require_caption)

    index = shards.index_shard(uri, slice_rows=slice_rows, require_caption=require_caption)
    assert [r.reason for r in index.rejects] == [e for e in expected if isinstance(e, str)]
    links = [e for e in expected if not isinstance(e, str)]
    assert index.num_samples == len(links) == sum(part.num_rows for part in index.slices)
    assert all(part.num_rows <= slice_rows for part in index.slices)

    whole = list(shards.read_shard(uri, require_caption=require_caption))
    images = [stored.get(link[1].removeprefix(f"{folder}/")) for link in links]
    assert [(s.key, s.row, s.image, s.caption) for s in whole if isinstance(s, Sample)] == [
        (key, row, image, caption or "")
        for row, ((key, _, caption), image) in enumerate(zip(links, images, strict=True))
        if image
    ]
    late = [r for r in whole if isinstance(r, Reject) and r not in index.rejects]
    assert [(r.key, r.reason) for r in late] == [
        (link[0], "missing" if image is None else "empty_image")
        for link, image in zip(links, images, strict=True)
        if not image
    ]
    assert len(whole) == len(rows)

    sliced = [row for part in index.slices for row in shards.read_slice_rows(part, require_caption=require_caption)]
    assert sliced == [row for row in whole if row not in index.rejects]
    plain = [row for part in index.slices for row in shards.read_slice(part, require_caption=require_caption)]
    assert [(s.key, s.row, s.image) for s in plain] == [
        (link[0], row, image or b"") for row, (link, image) in enumerate(zip(links, images, strict=True))
    ]


def test_a_repeated_key_is_told_within_4096_rows(tmp_path):
    uri = str(tmp_path / "l.csv")
    names = [f"{number}.jpg" for number in range(5000)]
    names[4095] = names[4096] = names[4500] = "0.jpg"
    write_csv(uri, ["uri"], [[name] for name in names])
    verdicts = [verdict for part in shards.cut_uri_list(uri) for verdict in shards.read_links(part)]
    found = [number for number, verdict in enumerate(verdicts) if isinstance(verdict, Reject)]
    assert found == [4095, 4500]
    assert "no key column" in verdicts[4095].detail
    assert [r.reason for r in shards.index_shard(uri, require_caption=False).rejects] == ["duplicate_key"] * 2


def test_rows_that_are_not_sound(root):
    uri = f"{root}/l.csv"
    body = b"\xef\xbb\xbfuri,key,caption\r\n1.jpg,a,b,c\r\n2.jpg\r\n2.jpg,b,x\ry\r\n3.jpg,c,\xff\r\n\xff.jpg,d,x\r\n4.jpg,\xff,x\r\n5.jpg,f,ok"
    files.write_bytes(uri, body)
    verdicts = [verdict for part in shards.cut_uri_list(uri, 2) for verdict in shards.read_links(part)]
    reasons = ["bad_row", "bad_row", "bad_row", "bad_caption_encoding", "unsafe_uri", "unsafe_path"]
    assert flat(verdicts) == [*reasons, ("f", f"{root}/5.jpg", "ok")]
    assert set(reasons) <= set(shards.REJECT_REASONS)
    assert [v.key for v in verdicts] == ["", "", "", "c", "d", "\ufffd", "f"]
    assert [r.reason for r in shards.index_shard(uri).rejects] == reasons


def test_lists_that_cannot_be_read(tmp_path):
    path = tmp_path / "l.csv"
    for body, message in [
        (b"", "it is empty"),
        (b"picture,key\n1.jpg,a\n", "no column of URIs; expected one of uri, url.*found picture, key"),
        (gzip.compress(b"uri\n1.jpg\n", mtime=0), "it is compressed"),
        (gzip.compress(b"uri\n1.jpg\n", mtime=ord("\r")), "it is compressed"),
        (b'uri,caption\n1.jpg,"open\n' + b"2.jpg,x\n" * 40_000, "row at byte 12: .*is a quote not closed"),
        (b"uri\n" + b"x" * (3 << 20), "a line of more than"),
    ]:
        path.write_bytes(body)
        for read in (shards.cut_uri_list, shards.index_shard, lambda uri: list(shards.read_shard(uri))):
            with pytest.raises(CirError, match=message):
                read(str(path))
    with pytest.raises(CirError, match="compressed CSV cannot be cut"):
        shards.is_uri_list("s3://bucket/l.csv.gz")
    pq.write_table(pa.table({"url": [1.5]}), tmp_path / "l.parquet")
    with pytest.raises(CirError, match="column url is double, expected string"):
        shards.cut_uri_list(str(tmp_path / "l.parquet"))
    with pytest.raises(CirError, match="slice_rows must be at least 1"):
        shards.cut_uri_list(str(path), 0)


def test_a_list_that_was_changed_is_noticed(tmp_path):
    for suffix in ("csv", "parquet"):
        uri = str(tmp_path / f"l.{suffix}")
        cut, indexed = None, None
        for rows in ([("1.jpg",), ("2.jpg",), ("3.jpg",)], [("1.jpg",)]):
            if suffix == "csv":
                write_csv(uri, ["uri"], rows)
            else:
                write_parquet(uri, ["uri"], rows, row_group_size=2)
            cut = cut or shards.cut_uri_list(uri, 2)
            indexed = indexed or shards.index_shard(uri, require_caption=False)
        with pytest.raises(CirError, match="cut it again"):
            list(shards.read_links(cut[1]))
        with pytest.raises(CirError, match="index it again"):
            list(shards.read_slice(indexed.slices[0], require_caption=False))


def test_a_parquet_file_with_images_stays_a_shard(tmp_path):
    uri = str(tmp_path / "s.parquet")
    for image in (pa.array([JPEG]), pa.array([{"bytes": JPEG, "path": "p"}])):
        pq.write_table(pa.table({"key": ["a"], "url": ["https://host/a.jpg"], "image": image, "caption": ["c"]}), uri)
        assert not shards.is_uri_list(uri)
        assert [s.image for s in shards.read_shard(uri)] == [JPEG]


# ---- where a list may point


def outcome(list_uri, given):
    try:
        return resolve(list_uri, given)
    except UnusableError as fault:
        return fault.reason


@pytest.mark.parametrize(
    ("list_uri", "given", "expected"),
    [
        ("/data/l.csv", "a b/1.jpg", "/data/a b/1.jpg"),
        ("l.csv", "1.jpg", "./1.jpg"),
        ("file:///da%20ta/l.csv", "a%20b.jpg", "/da ta/a%20b.jpg"),
        ("/data/l.csv", "../x/1.jpg", "/data/../x/1.jpg"),
        ("/data/l.csv", "/etc/hostname", "/etc/hostname"),
        ("/data/l.csv", "file:///etc/hostname", "file:///etc/hostname"),
        ("/data/l.csv", "s3://b/1.jpg?endpoint_override=h", "s3://b/1.jpg?endpoint_override=h"),
        ("s3://b/lists/l.csv", "1.jpg", "s3://b/lists/1.jpg"),
        ("s3://b/l.csv?endpoint_override=h", "1.jpg", "s3://b/1.jpg?endpoint_override=h"),
        ("s3://b/l.csv?endpoint_override=h", "s3://c/1.jpg?endpoint_override=h", "s3://c/1.jpg?endpoint_override=h"),
        ("s3://b/l.csv", "https://host/1.jpg?id=2", "https://host/1.jpg?id=2"),
        ("https://host/l/l.csv", "sub/1.jpg", "https://host/l/sub/1.jpg"),
        ("memory://m/l.csv", "memory://m/1.jpg", "memory://m/1.jpg"),
        ("s3://b/l.csv", "file:///etc/passwd", "unsafe_uri"),
        ("s3://b/l.csv", "FILE:///etc/passwd", "unsafe_uri"),
        ("s3://b/l.csv", "local:///etc/passwd", "unsafe_uri"),
        ("s3://b/l.csv", "/etc/passwd", "unsafe_uri"),
        ("https://host/l.csv", "../../etc/passwd", "unsafe_uri"),
        ("s3://b/l.csv", "simplecache::file:///etc/passwd", "unsafe_uri"),
        ("/data/l.csv", "zip://x::https://host/1.zip", "unsafe_uri"),
        ("s3://b/l.csv", "memory://m/1.jpg", "unsafe_uri"),
        ("s3://b/l.csv", "ssh://host/x", "unsafe_uri"),
        ("s3://b/l.csv", "s3://b/1.jpg?endpoint_override=elsewhere", "unsafe_uri"),
        (
            "s3://b/l.csv",
            "1.jpg?endpoint_override=elsewhere",
            "s3://b/1.jpg?endpoint_override=elsewhere?allow_bucket_creation=false",
        ),
        ("s3://b/l.csv", "https://host/1.jpg\r\nX: y", "unsafe_uri"),
    ],
)
def test_where_a_row_may_point(list_uri, given, expected):
    assert outcome(list_uri, given) == expected


def test_a_remote_list_reads_nothing_of_this_machine(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    uri = f"memory://{uuid.uuid4().hex}/l.csv"
    write_csv(uri, ["uri"], [[str(tmp_path / "secret.jpg")], [(tmp_path / "secret.jpg").as_uri()]])
    assert [row.reason for row in shards.read_shard(uri, require_caption=False)] == ["unsafe_uri"] * 2


def test_no_credentials_in_keys_and_rejects(tmp_path):
    uri = str(tmp_path / "l.csv")
    write_csv(uri, ["uri"], [["https://me:secret@host/a.jpg?sig=secret"], ["odd://me:secret@host/b.jpg"]])
    link, reject = [verdict for part in shards.cut_uri_list(uri) for verdict in shards.read_links(part)]
    assert link == Link("https://host/a.jpg", "https://me:secret@host/a.jpg?sig=secret", None)
    assert (reject.key, reject.reason) == ("odd://host/b.jpg", "unsafe_uri")
    assert "secret" not in str(reject)


# ---- fetching


class Answers(http.server.BaseHTTPRequestHandler):
    """The path says how to answer."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(f"GET {self.path}")
        status = int(self.path.rpartition("/")[2].partition(".")[0])
        self.send_response(status)
        broken = "broken" in self.path
        self.send_header("Content-Length", str(len(JPEG) + 10 * broken))
        self.end_headers()
        self.wfile.write(JPEG)
        self.close_connection = True

    def do_HEAD(self):
        self.asked.append(f"HEAD {self.path}")
        self.send_error(405)

    def log_message(self, *args):
        pass


@contextmanager
def web_server():
    handler = type("Handler", (Answers,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.asked
        finally:
            server.shutdown()
            thread.join()


def test_images_of_the_web(tmp_path):
    with web_server() as (host, asked):
        assert shards.fetch_image(f"{host}/200.jpg?sig=1") == JPEG
        assert asked == ["GET /200.jpg?sig=1"]  # not refused by the HEAD that fsspec would ask first
        for status in (404, 403, 410):
            with pytest.raises(CirError, match=rf"/{status}\.jpg: "):
                shards.fetch_image(f"{host}/{status}.jpg")
        for status in (429, 500, 503):
            asked.clear()
            with files.patience(0.3), pytest.raises(OSError, match=rf"/{status}\.jpg: the server answers {status}"):
                shards.fetch_image(f"{host}/{status}.jpg")
            assert len(asked) > 1  # tried again
        with files.patience(0), pytest.raises(OSError, match="broke off"):
            shards.fetch_image(f"{host}/broken/200.jpg")
        uri = str(tmp_path / "l.csv")
        write_csv(uri, ["url", "id"], [[f"{host}/200.jpg", "a"], [f"{host}/404.jpg", "b"], [f"{host}/x/200.jpg", "c"]])
        rows = list(shards.read_shard(uri, require_caption=False))
        assert [(row.key, getattr(row, "image", None) or row.reason) for row in rows] == [
            ("a", JPEG),
            ("b", "missing"),
            ("c", JPEG),
        ]
        write_csv(uri, ["url"], [[f"{host}/200.jpg"], [f"{host}/503.jpg"]])
        with files.patience(0), pytest.raises(OSError, match="503"):
            list(shards.read_shard(uri, require_caption=False))
    with files.patience(0), pytest.raises(OSError, match="no connection"):
        shards.fetch_image(f"{host}/200.jpg")
    for bad in ("http://", "https://host:port/x.jpg"):
        with pytest.raises(CirError, match=r"not an address|cannot open this kind of URI"):
            shards.fetch_image(bad)


def test_work_is_done_in_order_and_not_far_ahead():
    taken, released = [], threading.Event()

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    def work(number):
        if number == 0:
            released.wait(30)
        return number * number

    results = in_order(work, items(), 4)
    threading.Timer(0.1, released.set).start()
    assert next(results) == 0
    assert len(taken) == 4
    assert list(results) == [number * number for number in range(1, 20)]
    assert list(in_order(work, [], 4)) == []


# ---- image folders


def test_a_folder_is_indexed_from_its_listing_alone(root):
    for name, data in [("1.jpg", JPEG), ("1.txt", b"one"), ("2.jpg", b"two"), ("2.txt", b"\xff"), ("3.png", b"p")]:
        files.write_bytes(f"{root}/{name}", data)
    listed = files.list_files(root)
    index = shards.index_image_folder(root, 2)
    bare = shards.index_image_folder(root, 2, captions=False)
    rows = [row for part in index.slices for row in shards.read_slice_rows(part, require_caption=False)]
    assert [getattr(row, "caption", None) or getattr(row, "reason", "") for row in rows] == [
        "one",
        "bad_caption_encoding",
        "",
    ]
    texts = [file for file in listed if file.name.endswith(".txt")]
    for file in texts:
        filesystem, path = files.filesystem(file.uri)
        filesystem.delete_file(path)
    rows = [row for part in bare.slices for row in shards.read_slice(part, require_caption=False)]
    assert [(row.key, row.image, row.caption) for row in rows] == [
        ("1.jpg", JPEG, ""),
        ("2.jpg", b"two", ""),
        ("3.png", b"p", ""),
    ]
    for file in listed:
        if file not in texts:
            filesystem, path = files.filesystem(file.uri)
            filesystem.delete_file(path)
    assert shards.index_image_folder(root, 2, listed=listed) == index


# ---- globs, braces, prefixes, lists of shards


def fill(root, *names):
    for name in names:
        files.write_bytes(f"{root}/{name}", b"")


def below(root, uris):
    return [uri.removeprefix(f"{root}/") for uri in uris]


PARTS = st.sampled_from(["a", "b", "ab", "x.tar", "y.tar"])
GLOBS = st.lists(st.sampled_from(["**", "*", "a*", "?", "[ab]", "b"]), max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    paths=st.sets(st.lists(PARTS, min_size=1, max_size=4).map(tuple), max_size=12), pattern=GLOBS, last=st.booleans()
)
def test_globs_match_as_pythons(paths, pattern, last, tmp_path_factory):
    root = tmp_path_factory.mktemp("g")
    for path in sorted(paths):
        folders = [part.replace(".tar", "") for part in path[:-1]]
        folder = root.joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{path[-1].removesuffix('.tar')}.tar"
        target.write_bytes(b"")
    place = "/".join([str(root), *pattern, "*.tar" if last or not pattern else "**"])
    expected = sorted({path for path in glob.glob(place, recursive=True) if os.path.isfile(path)})  # noqa: PTH113, PTH207
    try:
        found = sorted(shards.list_shards(place))
    except CirError as error:
        assert "file matches" in str(error) or "no such file, folder" in str(error)  # noqa: PT017
        found = []
    assert found == expected


def test_braces_and_prefixes(root):
    fill(root, "train/0.tar", "train/1.tar", "val/0.tar", "val/deep/2.tar", "lists/a.csv", "lists/b.csv", "other/n.md")
    assert below(root, shards.list_shards(f"{root}/{{train,val}}/{{0..0}}.tar")) == ["train/0.tar", "val/0.tar"]
    assert below(root, shards.list_shards(f"{root}/{{train,val}}/*.tar")) == ["train/0.tar", "train/1.tar", "val/0.tar"]
    assert below(root, shards.list_shards(f"{root}/{{val,train}}")) == ["val/0.tar", "train/0.tar", "train/1.tar"]
    assert below(root, shards.list_shards(f"{root}/**/*.tar")) == [
        "train/0.tar",
        "train/1.tar",
        "val/0.tar",
        "val/deep/2.tar",
    ]
    assert shards.list_shards(root) == shards.list_shards(f"{root}/**/*.tar")  # none of its own
    assert below(root, shards.list_shards(f"{root}/val")) == ["val/0.tar"]  # one of its own
    assert below(root, shards.list_shards(f"{root}/lists/*.csv")) == ["lists/a.csv", "lists/b.csv"]
    assert below(root, shards.list_shards(f"{root}/lists/a.csv")) == ["lists/a.csv"]
    for bad in ("lists", "other", "{train,absent}/0.tar", "absent/**/*.tar"):
        with pytest.raises(CirError):
            shards.list_shards(f"{root}/{bad}")
    fill(root, "train/1.jpg")
    with pytest.raises(CirError, match="name the folder that holds the shards"):
        shards.list_shards(root)


def test_the_records_of_img2dataset_are_not_shards(root):
    fill(root, "00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet", "own.parquet")
    assert below(root, shards.list_shards(root)) == ["00000.tar", "00001.tar", "own.parquet"]
    assert below(root, shards.list_shards(f"{root}/*")) == ["00000.tar", "00001.tar", "own.parquet"]
    assert below(root, shards.list_shards(f"{root}/0000?.parquet")) == ["00000.parquet", "00001.parquet"]


def test_a_list_of_shards_in_a_file(root):
    fill(root, *(f"s/{number:02}.tar" for number in range(20)), "t/x.parquet", "t/sub/y.tar", "lists/z.tar")
    lines = [
        "# ours",
        "",
        f"{root}/s/{{00..02}}.tar",
        "  z.tar\r",
        f"{root}/t",
        f"{root}/s/0[12].tar",
        f"{root}/t/**/*.tar",
    ]
    files.write_bytes(f"{root}/lists/shards.txt", "\n".join(lines).encode())
    expected = ["s/00.tar", "s/01.tar", "s/02.tar", "lists/z.tar", "t/x.parquet", "t/sub/y.tar"]
    assert below(root, shards.list_shards(f"{root}/lists/shards.txt")) == expected
    many = "\n".join(f"{root}/s/{number:02}.tar" for number in range(20))
    files.write_bytes(f"{root}/many.txt", many.encode())
    assert len(shards.list_shards([f"{root}/many.txt", f"{root}/s"])) == 20
    for last, message in [
        (f"{root}/s/99.tar", "no such file"),
        (f"{root}/s/x*.tar", "no .* file matches"),
        (f"{root}/s/{{19..20}}.tar", "1 of 2 shards are missing"),
        (f"{root}/lists", None),
        ("many.md", "expected a folder or a name"),
        ("more.txt", "expected a folder or a name"),
    ]:
        files.write_bytes(f"{root}/many.txt", f"{many}\n\n{last}\n".encode())
        if message is None:
            assert len(shards.list_shards(f"{root}/many.txt")) == 21
            continue
        with pytest.raises(CirError, match=rf"many\.txt line 22: .*{message}"):
            shards.list_shards(f"{root}/many.txt")
    for body, message in [(b"\n# nothing\n", "names no shards"), (b"\xff", "not UTF-8")]:
        files.write_bytes(f"{root}/many.txt", body)
        with pytest.raises(CirError, match=message):
            shards.list_shards(f"{root}/many.txt")


def test_a_remote_list_of_shards_names_no_local_ones(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    uri = f"memory://{uuid.uuid4().hex}/l.txt"
    files.write_bytes(uri, f"{tmp_path}/a.tar\n".encode())
    with pytest.raises(CirError, match=r"l\.txt line 1: .*a local path"):
        shards.list_shards(uri)


def test_relative_lines_of_a_relative_list(tmp_path, monkeypatch):
    fill(str(tmp_path), "d/a b.tar", "d/c%20d.tar")
    (tmp_path / "d" / "l.txt").write_text("a b.tar\nc%20d.tar\n*.tar\n")
    monkeypatch.chdir(tmp_path)
    assert shards.list_shards("d/l.txt") == ["d/a b.tar", "d/c%20d.tar"]
    place = f"{tmp_path}/d"
    assert shards.list_shards(f"file://{place}/l.txt") == [f"{place}/a b.tar", f"{place}/c%20d.tar"]
    monkeypatch.chdir(tmp_path / "d")
    assert shards.list_shards("l.txt") == ["./a b.tar", "./c%20d.tar"]
    assert [size for _, size, _ in shards.shard_versions(shards.list_shards("l.txt"))] == [0, 0]
