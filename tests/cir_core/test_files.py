"""Local files, a remote file system (fsspec's memory://) and messages without secrets."""

import os
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cir_core import files
from cir_core.schema import CirError


@pytest.fixture(params=["plain", "relative", "file", "memory"])
def root(request, tmp_path, monkeypatch):
    if request.param == "relative":
        monkeypatch.chdir(tmp_path)
        return "some folder"
    if request.param == "file":
        return (tmp_path / "some folder").as_uri()
    return str(tmp_path / "some folder") if request.param == "plain" else f"memory://{uuid.uuid4().hex}"


def test_round_trip_and_listing(root):
    data = os.urandom(3000)
    files.write_bytes(files.join(root, "b", "two words.bin"), data)
    files.write_json(files.join(root, "a.json"), {"b": 1, "a": "é"})
    table = pa.table({"x": [1, 2, 3]})
    files.write_parquet(files.join(root, "c.parquet"), table)

    listed = files.list_files(root)
    assert [file.name for file in listed] == ["a.json", "b/two words.bin", "c.parquet"]
    by_name = {file.name.rpartition("/")[2]: file for file in listed}
    assert by_name["two words.bin"].size_bytes == 3000
    assert files.read_bytes(by_name["two words.bin"].uri) == data
    assert files.read_range(by_name["two words.bin"].uri, 100, 50) == data[100:150]
    assert files.read_range(by_name["two words.bin"].uri, 2990, 50) == data[2990:]
    assert files.size_bytes(by_name["two words.bin"].uri) == 3000
    assert files.read_json(files.join(root, "a.json")) == {"b": 1, "a": "é"}
    with files.open_random(by_name["c.parquet"].uri) as file:
        assert pq.read_table(file).equals(table)
    assert len(files.list_files(root, recursive=False)) == 2
    assert files.exists(root)
    assert files.is_folder(root)
    assert not files.exists(files.join(root, "nothing"))


def test_missing_things_are_named(root):
    uri = files.join(root, "absent.bin")
    for action in (files.read_bytes, files.size_bytes, files.read_json, files.list_files):
        with pytest.raises(CirError, match=r"absent\.bin: no such file"):
            action(uri)
    files.write_bytes(uri, b"x")
    with pytest.raises(CirError, match=r"absent\.bin"):
        files.list_files(uri)


def write_half(uri):
    with files.open_atomic(uri) as stream:
        stream.write(b"new")
        raise RuntimeError("half way")


def test_a_failed_write_leaves_the_old_file_and_no_litter(root):
    uri = files.join(root, "f.bin")
    files.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(uri)
    assert files.read_bytes(uri) == b"old"
    assert len(files.list_files(root)) == 1
    with files.open_atomic(uri) as stream:
        stream.write(b"new")
    assert files.read_bytes(uri) == b"new"
    assert len(files.list_files(root)) == 1


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(CirError, match="is a folder"):
        files.read_bytes(str(tmp_path))
    with pytest.raises(CirError, match="is not a file"):
        files.size_bytes(str(tmp_path))
    with pytest.raises(CirError, match="is a folder"):
        files.write_bytes(str(tmp_path), b"")
    assert list(tmp_path.iterdir()) == []


def test_written_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    files.write_bytes(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_bad_json_and_nan(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CirError, match=r"x\.json: not a JSON file"):
        files.read_json(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(str(tmp_path / "nan.json"), float("nan"))


def test_unknown_scheme():
    with pytest.raises(CirError, match="s4://bucket/x: cannot open this kind of URI"):
        files.read_bytes("s4://me:secret@bucket/x")
    with pytest.raises(CirError, match="is not a path"):
        files.exists("")


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("s3://AKIA:secret@bucket/a?region=x", "s3://bucket/a"),
        ("s3://AKIA:sec/ret/x@bucket/a", "s3://bucket/a"),
        ("s3://bucket/user@name/a", "s3://bucket/user@name/a"),
        ("s3://bucket/0000?.tar", "s3://bucket/0000?.tar"),
        ("https://me:pw@host:8080/a?X-Amz-Signature=abc&b=c/d", "https://host:8080/a"),
        ("https://host/a?token", "https://host/a"),
        ("https://me:p/w@host/a@b", "https://host/a@b"),
        ("https://host:8080/a:b@c", "https://host:8080/a:b@c"),
        (
            "abfs://container@account.dfs.core.windows.net/a",
            "abfs://container@account.dfs.core.windows.net/a",
        ),
        ("/local/user:x@y?a=b", "/local/user:x@y?a=b"),
        ("hdfs://node:8020/a@b", "hdfs://node:8020/a@b"),
    ],
)
def test_redact(uri, clean):
    assert files.redact(uri) == clean


@given(st.text("abcXYZ019/+=", min_size=6, max_size=40).filter(lambda s: len(set(s)) > 3))
def test_no_message_holds_the_secret(secret):
    uri = f"s3://AKIAKEY:{secret}@bucket/x?endpoint_override=127.0.0.1:1&region=r"
    assert secret not in files.redact(uri)
    with pytest.raises(CirError) as caught:  # the scheme does not exist
        files.read_bytes(f"nope://AKIAKEY:{secret}@bucket/x?token={secret}")
    assert secret not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.slow  # pyarrow retries for 6 s
def test_network_failures_stay_os_errors_without_secrets():
    uri = "s3://AKIAKEY:topsecret@bucket/x?endpoint_override=127.0.0.1:1&region=r&scheme=http"
    with pytest.raises(OSError, match="s3://bucket/x") as caught, files.patience(1):
        files.read_bytes(uri)
    assert "topsecret" not in str(caught.value)
    assert not isinstance(caught.value, CirError)


def test_a_client_serves_only_the_store_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:18001")
    first, _ = files.filesystem("s3://bucket/a")
    again, _ = files.filesystem("s3://bucket/b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:18002")
    second, _ = files.filesystem("s3://bucket/a")
    assert again is first
    assert second != first


def test_object_store_keys_are_literal():
    _, path = files.filesystem("s3://bucket/a b/100%25?region=us-east-1")
    assert path == "bucket/a b/100%25"
    assert files.join("s3://bucket?region=r", "a b") == "s3://bucket/a b?region=r"
    with pytest.raises(CirError, match="names no bucket"):
        files.join("s3://", "a")


@pytest.mark.parametrize(
    "folder",
    ["s3://bucket/a", "s3://key:secret@bucket", "gs://bucket/a", "gs://anonymous@bucket/a", "s3://bucket/a?region=r"]
    + [f"{scheme}://container@account.dfs.core.windows.net/a" for scheme in ("abfs", "abfss")],
)
@pytest.mark.parametrize(
    "key", ["photo?id=3.jpg", "b?c=1/d.jpg", "x?region=r", "x?region=r?", "x?id=3&scheme=http", "0?.tar"]
)
def test_a_key_that_ends_like_an_option_stays_one(folder, key, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:18001")  # or Amazon is asked for the bucket's region
    base, root = files.filesystem(folder)
    uri = files.join(folder, key)
    opened, path = files.filesystem(uri)
    assert path == f"{root.rstrip('/')}/{key}"
    assert opened == base
    assert files.redact(uri) == f"{files.redact(folder)}/{key}"
    assert files.filesystem(files.join(uri, "below"))[1] == f"{path}/below"
