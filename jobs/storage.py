"""Where a job's outputs live: one folder per run, checked before work starts, committed by a last file."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any, cast

from cir_core import files
from cir_core.schema import CirError
from jobs.config import public

STATE = "state.safetensors"  # what a tuning run can go on from, one in each <run>/state/step-NNNNNNNN/
CHECK_S = 15.0
"""Patience with a store while what the user typed is checked; see `files.patience`."""
_NAME = re.compile(r"\w[^/\\:?*#%\[\]{}\x00-\x1f]{0,199}")  # one folder in every store: no path, glob or URI query


def absolute(uri: str) -> str:
    """Return `uri` unchanged if it has a scheme, else as an absolute path.

    Raises:
        CirError: no place is named, or a relative path inside an unpacked Ray working_dir, which Ray deletes after the job.
    """
    _, separator, rest = uri.partition("://")
    if not uri.strip() or (separator and not rest.strip("/")):
        raise CirError(f"{uri!r} names no place: give a folder or a URI such as s3://bucket/prefix")
    if separator:
        return uri
    path = Path(uri).expanduser()
    if not path.is_absolute() and "runtime_resources" in Path.cwd().parts:
        raise CirError(
            f"{uri!r} is a relative path, and this job's working directory is Ray's temporary copy, deleted after the "
            "job: give an absolute path or a URI such as s3://bucket/prefix"
        )
    return str(path.absolute())


def check_writable(uri: str, field: str) -> None:
    """Write and remove a small file under `uri`, so that a wrong bucket or right shows before work starts."""
    try:
        with files.patience(CHECK_S):
            probe = files.join(absolute(uri), f".write-check-{uuid.uuid4().hex}")
            files.write_bytes(probe, b"")
            filesystem, path = files.filesystem(probe)
            filesystem.delete_file(path)
    except (OSError, CirError) as error:
        raise CirError(
            f"{field}={public(uri)!r} cannot be written to: {error}. Check that it exists and the credentials may write there"
        ) from None


class RunFolder:
    """A run's folder `<storage_path>/<job>/<name>/`, its recorded settings and its commit marker `result.json`.

    `uri` and `path()` open, so they hold the credentials of `storage_path`, if it has any; what is recorded does not.
    """

    def __init__(self, storage_path: str, job: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise CirError(
                f"run name {name!r} cannot be a folder's name: it must begin with a letter or digit, have at most 200 "
                "characters and none of / \\ : ? * # % [ ] { }; choose another --name"
            )
        self.name = name
        self.parent = files.join(absolute(storage_path), job)
        self.uri = files.join(self.parent, name)

    def path(self, *parts: str) -> str:
        """Return the URI of something inside the folder."""
        return files.join(self.uri, *parts)

    def claim(self, settings: dict[str, Any]) -> None:
        """Record the run's settings, or check that they are those of the run that already has this name.

        Raises:
            CirError: the name belongs to a run with other settings; the message lists the differences.
        """
        recorded = self.path("settings.json")
        settings = _as_json(settings)
        if not files.exists(recorded):
            files.write_json(recorded, settings)
        before = self._read("settings.json")  # also after writing: another job may have taken the name meanwhile
        differing = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if differing:
            shown = ", ".join(f"{key}: {_shown(before, key)} -> {_shown(settings, key)}" for key in differing)
            raise CirError(
                f"run {self.name!r} exists in {public(self.parent)} with other settings ({shown}); "
                "choose another --name, or the old settings to resume it"
            )

    def result(self) -> dict[str, Any] | None:
        """Return what the finished run recorded, None if it has not finished."""
        return self._read("result.json") if files.exists(self.path("result.json")) else None

    def commit(self, result: dict[str, Any]) -> None:
        """Mark the run as finished; written last. Credentials in `result` are left out."""
        files.write_json(self.path("result.json"), _as_json(result))

    def _read(self, name: str) -> dict[str, Any]:
        found = files.read_json(self.path(name))
        if not isinstance(found, dict):
            raise CirError(f"{public(self.path(name))}: not what a job writes; move it away, or choose another --name")
        return found


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as a reader of the file will see it: without credentials, tuples as lists, keys as text."""
    return cast(dict[str, Any], json.loads(json.dumps(public(value), allow_nan=False)))


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"


def newest_state(train_run_uri: str) -> tuple[int, str | None]:
    """Return (steps done, URI of the state file) of the newest checkpoint; (0, None) before the first."""
    best: tuple[int, str | None] = (0, None)
    if not files.exists(train_run_uri):
        return best
    for item in files.list_files(train_run_uri):
        found = re.search(rf"step-(\d+)/{re.escape(STATE)}$", item.uri)
        if found and int(found[1]) > best[0]:
            best = (int(found[1]), item.uri)
    return best


def forget_after(run_uri: str, steps: int) -> None:
    """Delete what was recorded of steps after `steps`: they are done again, perhaps in files of other steps."""
    for kind in ("samples", "rejects"):
        folder = files.join(run_uri, kind)
        for item in files.list_files(folder) if files.exists(folder) else ():
            found = re.search(r"step-(\d+)\.parquet$", item.uri)
            if found and int(found[1]) > steps:
                filesystem, path = files.filesystem(item.uri)
                filesystem.delete_file(path)


def steps_done(train_run_uri: str) -> int:
    """Return the steps that the newest checkpoint holds; 0 before the first."""
    return newest_state(train_run_uri)[0]
