"""Run folders on a local disk and on fsspec's memory:// file system; what may be written where."""

from __future__ import annotations

import http.server
import json
import os
import threading
import uuid
from pathlib import Path

import pytest

from cir_core import files
from cir_core.schema import CirError
from jobs.storage import RunFolder, absolute, check_writable, forget_after

SETTINGS = {"lr": 1e-4, "num_workers": (1, 4), "data": "scenes", "pretrained": None}


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "runs") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_claimed_folder_takes_the_same_settings_again(root):
    folder = RunFolder(root, "tat_train", "a")
    folder.claim(SETTINGS)
    before = files.read_bytes(folder.path("settings.json"))
    RunFolder(root, "tat_train", "a").claim(dict(reversed(SETTINGS.items())))
    RunFolder(root, "tat_train", "a").claim(SETTINGS | {"num_workers": [1, 4]})  # as JSON they are the same
    assert files.read_bytes(folder.path("settings.json")) == before
    RunFolder(root, "embed", "a").claim({"lr": 2})  # another job's run of that name is another run


def test_changed_settings_are_refused_and_all_differences_named(root):
    RunFolder(root, "tat_train", "a").claim(SETTINGS)
    changed = {key: value for key, value in SETTINGS.items() if key != "pretrained"} | {"lr": 2e-4, "seed": 3}
    with pytest.raises(CirError) as caught:
        RunFolder(root, "tat_train", "a").claim(changed)
    text = str(caught.value)
    assert "run 'a' exists" in text
    assert "lr: 0.0001 -> 0.0002" in text
    assert "seed: not set -> 3" in text
    assert "pretrained" not in text  # None and absent read the same
    assert "num_workers" not in text
    assert "--name" in text
    RunFolder(root, "tat_train", "a").claim(SETTINGS)  # nothing was overwritten


def test_the_result_is_there_only_after_the_commit(root):
    folder = RunFolder(root, "embed", "a")
    assert folder.result() is None
    folder.claim(SETTINGS)
    files.write_bytes(folder.path("part", "x.bin"), b"1")
    assert folder.result() is None
    folder.commit({"rows": 3, "gap": 0.5})
    assert RunFolder(root, "embed", "a").result() == {"rows": 3, "gap": 0.5}
    folder.commit({"rows": 3, "published": True})
    assert folder.result() == {"rows": 3, "published": True}


def test_a_commit_that_cannot_be_written_leaves_no_marker(root):
    folder = RunFolder(root, "embed", "a")
    for result in ({"loss": float("nan")}, {"store": object()}):
        with pytest.raises((ValueError, TypeError)):
            folder.commit(result)
        assert folder.result() is None
    names = [item.name for item in files.list_files(folder.uri)] if files.exists(folder.uri) else []
    assert names == []


@pytest.mark.parametrize("text", ["{half", "[1]", '"x"'])
def test_a_damaged_record_is_named(root, text):
    folder = RunFolder(root, "embed", "a")
    for name in ("settings.json", "result.json"):
        files.write_bytes(folder.path(name), text.encode())
    with pytest.raises(CirError, match=r"settings\.json"):
        folder.claim(SETTINGS)
    with pytest.raises(CirError, match=r"result\.json"):
        folder.result()


def test_records_hold_no_credentials(root):
    folder = RunFolder(root, "embed", "a")
    secret = {"data": "s3://KEYID:hush@bucket/x", "more": [{"uri": "https://me:hush@h/y?token=hush"}]}
    folder.claim(secret)
    folder.commit(secret)
    for item in files.list_files(folder.uri):
        text = files.read_bytes(item.uri).decode()
        assert "hush" not in text
        assert "KEYID" not in text
        assert "bucket" in text
    folder.claim(secret | {"data": "s3://KEYID:rotated@bucket/x"})  # new keys, the same run
    with pytest.raises(CirError) as caught:
        folder.claim(secret | {"data": "s3://KEYID:hush@other/x"})
    assert "s3://bucket/x" in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "..", ".", ".hidden", "a/b", "../x", "/x", "a\\b", "a?b=c", "a*", "a\nb", "a" * 201]
)
def test_a_name_that_is_no_folder_is_refused(root, name):
    with pytest.raises(CirError, match="--name"):
        RunFolder(root, "embed", name)


@pytest.mark.parametrize("name", ["a", "ViT-L-14-1a2b3c4d", "my run (2), alpha=0.5", "été", "v1.2"])
def test_a_plain_name_is_one_folder(root, name):
    folder = RunFolder(root, "embed", name)
    folder.commit({})
    assert [item.name for item in files.list_files(root)] == [f"embed/{name}/result.json"]


def test_check_writable_leaves_nothing(root):
    check_writable(root, "storage_path")
    assert not files.exists(root) or files.list_files(root) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for uri in (str(tmp_path / "file" / "below"), "/proc/cir", "nosuch://bucket/x", "s3://"):
        with pytest.raises(CirError, match=r"^output='.*' cannot be written to: ") as caught:
            check_writable(uri, "output")
        assert uri in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CirError, match=r"output='.*' cannot be written to: .*access refused"):
            check_writable(str(tmp_path), "output")
    finally:
        tmp_path.chmod(0o755)


def test_a_refused_place_does_not_print_its_credentials():
    with pytest.raises(CirError) as caught:
        check_writable("nosuch://KEYID:hush@bucket/x", "output")
    assert "hush" not in str(caught.value)
    assert "nosuch://bucket/x" in str(caught.value)


class ObjectStore(http.server.BaseHTTPRequestHandler):
    """Answers every request as S3 does for a bucket that is not there (404) or not ours (403)."""

    code, reason = 404, "NoSuchBucket"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        text = f"<?xml version='1.0'?><Error><Code>{self.reason}</Code><Message>{self.reason}</Message></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response(self.code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(("code", "reason"), [(404, "NoSuchBucket"), (403, "AccessDenied")])
def test_a_missing_or_foreign_bucket_is_named_without_the_credentials(monkeypatch, code, reason):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Store", (ObjectStore,), {"code": code, "reason": reason})
    )
    threading.Thread(target=store.serve_forever, daemon=True).start()
    options = f"endpoint_override=127.0.0.1:{store.server_address[1]}&scheme=http&region=us-east-1"
    try:
        with pytest.raises(CirError) as caught:
            check_writable(f"s3://KEYID:hush@nobucket/runs?{options}", "storage_path")
    finally:
        store.shutdown()
        store.server_close()
    text = str(caught.value)
    assert text.startswith("storage_path='s3://nobucket/runs' cannot be written to: ")
    assert "no such file, folder or bucket" in text if code == 404 else "access refused" in text
    assert "hush" not in text
    assert "KEYID" not in text


def test_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("a/b") == str(tmp_path / "a/b")
    assert absolute("/a/b") == "/a/b"
    assert absolute("~/b") == "/home/someone/b"
    for uri in ("s3://bucket/a?region=x", "memory://x", "file:///a"):
        assert absolute(uri) == uri
    for empty in ("", "  ", "s3://", "memory:///"):
        with pytest.raises(CirError, match="names no place"):
            absolute(empty)


def test_a_relative_path_in_ray_s_copy_of_the_code_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(CirError, match=r"'\.run/storage' is a relative path.*absolute path or a URI"):
        absolute(".run/storage")
    assert absolute("/data") == "/data"
    assert absolute("s3://bucket/x") == "s3://bucket/x"
    with pytest.raises(CirError, match="relative path"):
        RunFolder("runs", "embed", "a")


def test_settings_are_readable_json(tmp_path):
    RunFolder(str(tmp_path), "embed", "a").claim(SETTINGS)
    stored = json.loads((Path(tmp_path) / "embed" / "a" / "settings.json").read_text())
    assert stored == {**SETTINGS, "num_workers": [1, 4]}


def test_what_was_recorded_after_a_checkpoint_is_deleted(tmp_path):
    """Of another interval between checkpoints, or steps would be listed twice."""
    names = ["step-00000004.parquet", "step-00000008.parquet", "step-00000012.parquet", "structural.parquet"]
    for name in names:
        files.write_bytes(str(tmp_path / "samples" / name), b"x")
    forget_after(str(tmp_path), 8)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [names[0], names[1], names[3]]
    forget_after(str(tmp_path / "nothing yet"), 0)
