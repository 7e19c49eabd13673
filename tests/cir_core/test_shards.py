"""Shards against a naive reading with tarfile and pyarrow; truncation, hostile members, listing, writing."""

import io
import json
import os
import pickle
import re
import tarfile
import uuid
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cir_core import files, shards
from cir_core.schema import CirError, Reject
from cir_core.shards import Sample, shard_versions, tar
from cir_core.shards import model as shard_model

JPEG = b"\xff\xd8 stands for an image; shards never decode"


def make_tar(members, fmt=tarfile.PAX_FORMAT):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fmt) as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def plain(*members):
    return [(name, data, tarfile.REGTYPE) for name, data in members]


def read_all(uri, **options):
    rows = list(shards.read_shard(uri, **options))
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Reject)]


def read_three_ways(uri, slice_rows=2, **options):
    """Read by index and slices and as a whole; both must agree. Returns samples and rejects."""
    index = shards.index_shard(uri, slice_rows=slice_rows, **options)
    samples, rejects = read_all(uri, **options)
    assert index.num_samples == len(samples)
    assert list(index.rejects) == rejects
    assert {reject.reason for reject in rejects} <= set(shards.REJECT_REASONS)
    sliced = []
    for part in index.slices:
        read = list(shards.read_slice(part, **options))
        assert part.first_row == len(sliced)
        assert part.num_rows == len(read) > 0
        sliced += read
    assert sliced == samples
    assert [sample.row for sample in samples] == list(range(len(samples)))
    assert len({sample.key for sample in samples}) == len(samples)
    if options.get("require_caption", True):
        assert list(shards.read_captions(uri)) == [(sample.key, sample.caption) for sample in samples]
    return samples, rejects


# ---- tar: a naive reference


def naive_tar(data, require_caption):
    """(key, image, caption) or (key, reason) of each sample of a sound tar, by tarfile and lists."""
    groups = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            if member.isdir():
                continue
            name = re.sub(r"^(\./+)+", "", member.name)
            match = re.match(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", name, re.DOTALL)
            key, suffix = match.groups() if match else (name, "")
            content = archive.extractfile(member).read() if member.isreg() else None
            if not groups or groups[-1][0] != key or suffix.lower() in dict(groups[-1][1]):
                groups.append((key, []))
            groups[-1][1].append((suffix.lower(), content))
            groups[-1] = (*groups[-1][:2], name)
    out, kept = [], set()
    for key, members, name in groups:
        verdict = naive_verdict(key, members, name, kept, require_caption)
        out.append((key, *verdict))
        kept |= {key} if len(verdict) == 2 else set()
    return out


def naive_verdict(key, members, name, kept, require_caption):
    members = dict(members)
    images = [(suffix, data) for suffix, data in members.items() if suffix in shards.IMAGE_SUFFIXES][:1]
    texts = [(suffix, members[suffix]) for suffix in ("txt", "json") if suffix in members]
    if name.startswith("/") or ".." in name.split("/") or not name:
        return ("unsafe_path",)
    if any(data is None for _, data in images + texts):
        return ("not_a_file",)
    if key in kept:
        return ("duplicate_key",)
    if not images:
        return ("missing_image",)
    if images[0][1] == b"":
        return ("empty_image",)
    try:
        caption = naive_caption(texts)
    except UnicodeDecodeError:
        return ("bad_caption_encoding",)
    except (ValueError, AttributeError):
        return ("bad_json",)
    return ("missing_caption",) if caption is None and require_caption else (images[0][1], caption or "")


def naive_caption(texts):
    if not texts or texts[0][0] == "txt":
        return texts[0][1].decode() if texts else None
    caption = json.loads(texts[0][1].decode()).get("caption")
    if caption is not None and not isinstance(caption, str):
        raise ValueError(caption)
    return caption


def flat(samples, rejects):
    return sorted([(s.key, s.image, s.caption) for s in samples] + [(r.key, r.reason) for r in rejects], key=repr)


NAMES = st.one_of(
    st.tuples(
        st.sampled_from(["0", "1", "2", "a/0", "./0", "é", "x" * 120, ".hid", "../up", "/abs"]),
        st.sampled_from(["jpg", "jpg", "JPEG", "png", "txt", "txt", "json", "cls", "b.jpg"]),
    ).map(".".join),
    st.sampled_from(["README", "folder", "d/", "0"]),
)
DATA = st.sampled_from(
    [
        b"",
        b"x",
        JPEG,
        b"y" * 512,
        b"z" * 1500,
        b"\xff\xfe",
        b'{"caption": "c"}',
        b'{"caption": 1}',
        b"[1]",
        b"{",
    ]
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, DATA, KINDS), max_size=14),
    fmt=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    require_caption=st.booleans(),
    slice_rows=st.integers(1, 4),
)
def test_random_tars_match_the_naive_reading(members, fmt, require_caption, slice_rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random.tar"
    data = make_tar(members, fmt)
    path.write_bytes(data)
    samples, rejects = read_three_ways(str(path), slice_rows, require_caption=require_caption)
    expected = naive_tar(data, require_caption)
    assert flat(samples, rejects) == sorted(expected, key=repr)
    assert [s.key for s in samples] == [row[0] for row in expected if len(row) == 3]


# ---- tar: truncation and damage

SMALL = [
    *plain(("000.jpg", JPEG), ("000.txt", b"first")),
    *plain(("001.json", b'{"caption": "second"}'), ("001.png", b"p" * 700)),
    *plain(("002" + "x" * 110 + ".jpg", JPEG), ("002" + "x" * 110 + ".txt", "dritté".encode())),
]


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("require_caption", [True, False])
def test_truncation_at_every_byte(tmp_path, fmt, require_caption):
    data = make_tar(SMALL, fmt)
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    whole, none = read_three_ways(str(path), require_caption=require_caption)
    assert none == []
    assert [sample.caption for sample in whole] == ["first", "second", "dritté"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = [archive.getmembers()[position].offset for position in (2, 4)]
        last = archive.getmembers()[5]
    ends.append(last.offset_data + (last.size + 511) // 512 * 512)
    for length in range(512, len(data)):
        rows = tar.tar_rows(tar.TarStream(io.BytesIO(data[:length]), length), load=True)
        verdicts = list(shard_model.read_rows(rows, shard=whole[0].shard, require_caption=require_caption))
        samples = [verdict for verdict in verdicts if isinstance(verdict, Sample)]
        assert samples == whole[: len(samples)]
        # a sample counts once a whole header, or the marker, follows it; long names take several headers
        assert sum(length >= end + 2048 for end in ends) <= len(samples) <= sum(length >= end + 512 for end in ends)
        assert [verdict.reason for verdict in verdicts[len(samples) :]] == ["truncated_tar"] * (len(samples) < 3)
        if length % 512 in (0, 1, 300, 511):
            path.write_bytes(data[:length])
            assert read_three_ways(str(path), require_caption=require_caption) == (
                samples,
                verdicts[len(samples) :],
            )
    for length in (0, 1, 511):
        path.write_bytes(data[:length])
        for read in (shards.index_shard, read_all):
            with pytest.raises(CirError, match=r"unreadable shard .*t\.tar"):
                read(str(path), require_caption=require_caption)


def test_remote_streams_read_the_same(tmp_path):
    members = [*SMALL, *plain(("003.jpg", b""), ("003.txt", b"x"), ("000.jpg", JPEG), ("004.jpg", JPEG))]
    data = make_tar(members)
    for cut in (len(data), 5000, 3000):
        local, remote = tmp_path / "a.tar", f"memory://{uuid.uuid4().hex}/a.tar"
        local.write_bytes(data[:cut])
        files.write_bytes(remote, data[:cut])
        ours = read_three_ways(str(local))
        theirs = read_three_ways(remote)
        assert flat(*ours) == flat(*theirs)
        local_slices = shards.index_shard(str(local)).slices
        remote_slices = shards.index_shard(remote).slices
        assert [(s.offset, s.length) for s in local_slices] == [(s.offset, s.length) for s in remote_slices]


def test_damaged_header_second_archive_and_lone_marker(tmp_path):
    data = bytearray(make_tar(SMALL))
    path = tmp_path / "d.tar"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        damaged_at = archive.getmembers()[4].offset
    data[damaged_at + 150] ^= 0xFF
    path.write_bytes(data)
    samples, rejects = read_three_ways(str(path))
    assert [sample.caption for sample in samples] == ["first"]
    assert [(reject.key, reject.reason) for reject in rejects] == [("001", "corrupt_tar")]

    path.write_bytes(make_tar(SMALL) + make_tar(SMALL))
    samples, rejects = read_three_ways(str(path))
    assert len(samples) == 3
    assert [(reject.key, reject.reason) for reject in rejects] == [("", "trailing_data")]

    path.write_bytes(make_tar([]))
    assert read_three_ways(str(path)) == ([], [])


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(make_tar(SMALL)) - 1), value=st.integers(0, 255))
def test_any_damaged_byte_never_breaks_the_counts(position, value, tmp_path_factory):
    data = bytearray(make_tar(SMALL))
    data[position] = value
    path = tmp_path_factory.getbasetemp() / "byte.tar"
    path.write_bytes(data)
    if position < 512 and value != make_tar(SMALL)[position]:  # only the first header makes a file unreadable
        with suppress(CirError):
            read_three_ways(str(path))
        return
    samples, rejects = read_three_ways(str(path))
    assert len(samples) + len(rejects) >= 1


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=3000))
def test_garbage_is_an_unreadable_shard(data, tmp_path_factory):
    for name in ("garbage.tar", "garbage.parquet"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(data)
        if name.endswith("tar") and len(data) >= 512 and not data[:512].strip(b"\0"):
            continue  # starts with an end-of-archive marker
        for read in (shards.index_shard, read_all):
            with pytest.raises(CirError, match="unreadable shard"):
                read(str(path))


def test_names_that_are_not_utf8(tmp_path):
    data = make_tar([*SMALL, *plain(("bad\udcff.jpg", JPEG), ("bad\udcff.txt", b"c"))], tarfile.GNU_FORMAT)
    (tmp_path / "n.tar").write_bytes(data)
    samples, rejects = read_three_ways(str(tmp_path / "n.tar"))
    assert len(samples) == 3
    assert [(reject.key, reject.reason) for reject in rejects] == [("bad\ufffd", "unsafe_path")]


def test_huge_member_is_rejected_unread(tmp_path):
    path, size = tmp_path / "huge.tar", shards.MAX_SAMPLE_BYTES + 512
    info = tarfile.TarInfo("0.jpg")
    info.size = size
    with path.open("wb") as sink:  # a sparse file: nothing of that size is ever written
        sink.write(info.tobuf())
        sink.seek(512 + size)
        sink.write(make_tar([("0.txt", b"c", tarfile.REGTYPE), *SMALL]))
    samples, rejects = read_three_ways(str(path))
    assert [sample.caption for sample in samples] == ["first", "second", "dritté"]
    assert [(reject.key, reject.reason) for reject in rejects] == [("0", "sample_too_large")]


def test_slices_are_cut_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_model, "MAX_SLICE_BYTES", 4096)
    path = str(tmp_path / "s.tar")
    shards.write_tar_shard(path, [(f"{n:03}", b"i" * 1500, "jpg", "c") for n in range(9)])
    index = shards.index_shard(path)
    assert [part.num_rows for part in index.slices] == [1] * 9
    assert len(read_three_ways(path, 100)[0]) == 9


def test_a_changed_shard_is_noticed(tmp_path):
    path = str(tmp_path / "c.tar")
    shards.write_tar_shard(path, [(f"{n:03}", JPEG, "jpg", "c") for n in range(6)])
    part = shards.index_shard(path).slices[0]
    assert pickle.loads(pickle.dumps(part)) == part  # noqa: S301 - slices travel between Ray workers
    shards.write_tar_shard(path, [(f"{n:03}", JPEG, "jpg", None) for n in range(6)])
    with pytest.raises(CirError, match="index it again"):
        list(shards.read_slice(part))
    shards.write_tar_shard(path, [])
    with pytest.raises(CirError, match="index it again"):
        list(shards.read_slice(part))


# ---- Parquet


def naive_parquet(rows, require_caption):
    out, kept = [], set()
    for key, image, caption in rows:
        verdict = naive_parquet_verdict(key, image, caption, kept, require_caption)
        out.append((key.decode("utf-8", "replace") if key else "", *verdict))
        kept |= {out[-1][0]} if len(verdict) == 2 else set()
    return out


def naive_parquet_verdict(key, image, caption, kept, require_caption):
    if not key:
        return ("missing_key",)
    if b"\xff" in key:
        return ("unsafe_path",)
    if key.decode() in kept:
        return ("duplicate_key",)
    if image is None:
        return ("missing_image",)
    if image == b"":
        return ("empty_image",)
    if caption is not None and b"\xff" in caption:
        return ("bad_caption_encoding",)
    if caption is None and require_caption:
        return ("missing_caption",)
    return image, (caption or b"").decode()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([*(str(n).encode() for n in range(12)), b"", b"\xff", None]),
            st.sampled_from([JPEG, b"i", b"i", b"", None]),
            st.sampled_from([b"c", "é".encode(), b"", b"\xff", None]),
        ),
        max_size=20,
    ),
    row_group_size=st.integers(1, 7),
    slice_rows=st.integers(1, 6),
    require_caption=st.booleans(),
    struct=st.booleans(),
)
def test_random_parquet_matches_the_naive_reading(
    rows, row_group_size, slice_rows, require_caption, struct, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "random.parquet"
    keys, images, captions = (pa.array([row[n] for row in rows], pa.binary()) for n in range(3))
    if struct:
        images = pa.array(
            [None if r[1] is None else {"bytes": r[1], "path": "p"} for r in rows],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    text = [pa.Array.from_buffers(pa.string(), len(a), a.buffers()) for a in (keys, captions)]  # not validated
    pq.write_table(pa.table({"key": text[0], "image": images, "caption": text[1]}), path, row_group_size=row_group_size)
    samples, rejects = read_three_ways(str(path), slice_rows, require_caption=require_caption)
    expected = naive_parquet(rows, require_caption)
    assert flat(samples, rejects) == sorted(expected, key=repr)
    assert [s.key for s in samples] == [row[0] for row in expected if len(row) == 3]
    for part in shards.index_shard(str(path), slice_rows=slice_rows, require_caption=require_caption).slices:
        assert part.length == 1 or part.num_rows <= slice_rows


def test_parquet_columns_of_img2dataset_and_integer_keys(tmp_path):
    path = str(tmp_path / "i.parquet")
    table = pa.table(
        {
            "url": ["u"] * 3,
            "key": [1, 2, 3],
            "caption": pa.array(["a", "b", "c"]).dictionary_encode(),
            "status": ["success", "failed_to_download", "success"],
            "jpg": pa.array([JPEG, None, JPEG], pa.large_binary()),
        }
    )
    pq.write_table(table, path)
    samples, rejects = read_three_ways(path)
    assert [(s.key, s.image, s.caption) for s in samples] == [("1", JPEG, "a"), ("3", JPEG, "c")]
    assert [(r.key, r.reason) for r in rejects] == [("2", "missing_image")]


def test_parquet_with_the_wrong_columns(tmp_path):
    path = str(tmp_path / "w.parquet")
    pq.write_table(pa.table({"key": ["a"], "picture": [b"x"]}), path)
    with pytest.raises(CirError, match=r"no image column; expected one of image, jpg.*found key, picture"):
        shards.index_shard(path)
    pq.write_table(pa.table({"key": ["a"], "image": ["text"]}), path)
    with pytest.raises(CirError, match="column image is string, expected binary"):
        shards.index_shard(path, require_caption=False)
    pq.write_table(pa.table({"key": ["a"], "image": [b"x"]}), path)
    with pytest.raises(CirError, match="no caption column"):
        shards.index_shard(path)
    assert [s.caption for s in read_three_ways(path, require_caption=False)[0]] == [""]


def test_truncated_parquet_is_unreadable(tmp_path):
    path = tmp_path / "t.parquet"
    shards.write_parquet_shard(str(path), [(f"{n}", JPEG * 20, "jpg", "c") for n in range(50)])
    data = path.read_bytes()
    for cut in (0, 3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        for read in (shards.index_shard, read_all):
            with pytest.raises(CirError, match="unreadable shard"):
                read(str(path))


def test_large_row_group_is_a_slice_of_its_own(tmp_path):
    path = str(tmp_path / "l.parquet")
    shards.write_parquet_shard(path, [(f"{n}", JPEG, "jpg", "c") for n in range(25)], row_group_rows=10)
    assert [part.num_rows for part in shards.index_shard(path, slice_rows=4).slices] == [10, 10, 5]
    assert [part.num_rows for part in shards.index_shard(path, slice_rows=20).slices] == [20, 5]
    assert [(p.offset, p.length) for p in shards.index_shard(path, slice_rows=20).slices] == [(0, 2), (2, 1)]


# ---- writing


@pytest.mark.parametrize(
    ("write", "suffix"), [(shards.write_tar_shard, "tar"), (shards.write_parquet_shard, "parquet")]
)
def test_write_round_trip_is_deterministic(tmp_path, write, suffix):
    rows = [("000", JPEG, "jpg", "eins"), ("a/é" + "x" * 200, b"p", "png", ""), ("002", b"w", "webp", None)]
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    assert write(str(first), iter(rows)) == write(str(second), rows) == 3
    assert first.read_bytes() == second.read_bytes()
    samples, rejects = read_three_ways(str(first), require_caption=False)
    assert [(s.key, s.image, s.caption) for s in samples] == [(k, i, c or "") for k, i, _, c in rows]
    assert rejects == []
    assert [r.reason for r in read_three_ways(str(first))[1]] == ["missing_caption"]

    def broken():
        yield from rows
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        write(str(tmp_path / f"c.{suffix}"), broken())
    for bad in [
        ("", b"", "jpg", ""),
        ("../x", b"", "jpg", ""),
        ("000", b"", "exe", ""),
        ("/x", b"", "jpg", ""),
    ]:
        with pytest.raises(CirError, match="key"):
            write(str(tmp_path / f"c.{suffix}"), [bad])
    with pytest.raises(CirError, match="given twice"):
        write(str(tmp_path / f"c.{suffix}"), [rows[0], rows[0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_tar_keys_have_no_dot(tmp_path):
    with pytest.raises(CirError, match=r"'a\.b'.*dot"):
        shards.write_tar_shard(str(tmp_path / "x.tar"), [("a.b", JPEG, "jpg", "c")])


# ---- listing


@pytest.fixture(params=["local", "relative", "memory"])
def folder(request, tmp_path, monkeypatch):
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "data")
    if request.param == "relative":
        monkeypatch.chdir(tmp_path)
        root = "data"
    for name in (
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "x.parquet",
        "notes.txt",
        "sub/00003.tar",
        ".0.tar.tmp",
    ):
        files.write_bytes(files.join(root, name), b"")
    return root


def test_list_shards(folder):
    def names(uris):
        return [uri[len(folder) + 1 :] for uri in uris]

    tars = ["00000.tar", "00001.tar", "00002.tar"]
    assert names(shards.list_shards(folder)) == [*tars, "x.parquet"]
    assert names(shards.list_shards(f"{folder}/0000[01].tar")) == tars[:2]
    assert names(shards.list_shards(f"{folder}/0000?.tar")) == tars
    assert names(shards.list_shards(f"{folder}/*/*.tar")) == ["sub/00003.tar"]
    assert names(shards.list_shards(f"{folder}/{{00001..00002}}.tar")) == tars[1:]
    assert names(shards.list_shards([f"{folder}/x.parquet", folder])) == ["x.parquet", *tars]
    with pytest.raises(CirError, match=r"1 of 4 shards are missing: .*00003\.tar"):
        shards.list_shards(f"{folder}/{{00000..00003}}.tar")
    for bad in ("nothing", "absent.tar", "notes.txt", "*.zip", "{2..1}.tar"):
        with pytest.raises(CirError, match=re.escape(bad)):
            shards.list_shards(f"{folder}/{bad}")
    with pytest.raises(CirError, match="no shards given"):
        shards.list_shards([])


def test_list_shards_of_an_empty_folder(tmp_path):
    with pytest.raises(CirError, match=r"no \*\.tar or \*\.parquet"):
        shards.list_shards(str(tmp_path))
    with pytest.raises(CirError, match=r"ends in \.tar or \.parquet"):
        shards.index_shard(str(tmp_path / "a.tar.gz"))
    with pytest.raises(CirError, match="slice_rows must be at least 1"):
        shards.index_shard(str(tmp_path / "a.tar"), slice_rows=0)


# ---- image folders


def test_image_folder(tmp_path):
    for name, data in [
        ("b.JPG", JPEG), ("b.txt", b"a bee"), ("a/1.png", b"p"), ("a/1.txt", b"\xff"), ("c d.webp", b"w"),
        ("e.jpg", b""), ("notes.md", b"n"),
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    uri = tmp_path.as_uri()
    assert [file.name for file in shards.list_images(uri)] == ["a/1.png", "b.JPG", "c d.webp", "e.jpg"]
    index = shards.index_image_folder(uri, 1)
    assert [(r.key, r.reason) for r in index.rejects] == [("e.jpg", "empty_image")]
    rows = [row for part in index.slices for row in shards.read_slice_rows(part, require_caption=False)]
    samples = [row for row in rows if isinstance(row, Sample)]
    assert [(s.key, s.row, s.image, s.caption) for s in samples] == [
        ("b.JPG", 1, JPEG, "a bee"),
        ("c d.webp", 2, b"w", ""),
    ]
    assert [(r.key, r.reason) for r in rows if isinstance(r, Reject)] == [("a/1.png", "bad_caption_encoding")]
    assert index.num_samples == len(rows)
    strict = shards.index_image_folder(uri, require_caption=True)
    assert [(r.key, r.reason) for r in strict.rejects] == [("c d.webp", "missing_caption"), ("e.jpg", "empty_image")]
    kept = [sample for part in strict.slices for sample in shards.read_slice(part)]
    assert [(s.key, s.row, s.image, s.caption) for s in kept] == [("a/1.png", 0, b"", ""), ("b.JPG", 1, JPEG, "a bee")]
    (tmp_path / "b.JPG").unlink()
    gone = list(shards.read_slice_rows(strict.slices[0]))
    assert [(r.key, r.reason) for r in gone] == [("a/1.png", "bad_caption_encoding"), ("b.JPG", "missing")]
    assert "b.JPG: no such file" in gone[1].detail
    assert [s.image for s in shards.read_slice(strict.slices[0])] == [b"", b""]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CirError, match="no image in this folder"):
        shards.list_images(str(tmp_path / "empty"))


def test_shard_versions_follow_the_order_given(tmp_path):
    for folder, name, size in (("a", "1.tar", 5), ("b", "0.tar", 7), ("a", "0.tar", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"x" * size)
        os.utime(tmp_path / folder / name, ns=(size * 1_000_000_000,) * 2)
    shards = [f"{tmp_path}/b/0.tar", f"{tmp_path}/a/1.tar", f"{tmp_path}/a/0.tar"]
    expected = [(shard, size, size * 1_000_000_000) for shard, size in zip(shards, (7, 5, 3), strict=True)]
    assert shard_versions(shards) == expected


def test_images_are_found_by_key_and_no_shard_is_read_in_vain(tmp_path):
    for name, keys in (("0.tar", "ab"), ("1.tar", "cd")):
        members = [(f"{key}.jpg", JPEG + key.encode()) for key in keys]
        (tmp_path / name).write_bytes(make_tar(plain(*members)))
    places = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar"), str(tmp_path / "not there.tar")]
    assert shards.find_images(places, ["d", "a"]) == {"a": JPEG + b"a", "d": JPEG + b"d"}
    assert shards.find_images(places[:2], {"b", "nowhere"}) == {"b": JPEG + b"b"}
