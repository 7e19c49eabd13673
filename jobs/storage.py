"""Where a job's outputs live: one folder per run, checked before work starts, committed by a last file."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, cast

from cir_core import files
from cir_core.schema import CirError


def absolute(uri: str) -> str:
    """Return `uri` unchanged if it has a scheme, else as an absolute path.

    Raises:
        CirError: a relative path inside an unpacked Ray working_dir, which Ray deletes after the job.
    """
    if "://" in uri:
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
    probe = files.join(uri, f".write-check-{uuid.uuid4().hex}")
    try:
        files.write_bytes(probe, b"")
        filesystem, path = files.filesystem(probe)
        filesystem.delete_file(path)
    except (OSError, CirError) as error:
        raise CirError(
            f"{field}={uri!r} cannot be written to: {error}. Check that it exists and the credentials may write there"
        ) from None


class RunFolder:
    """A run's folder `<storage_path>/<job>/<name>/`, its recorded settings and its commit marker `result.json`."""

    def __init__(self, storage_path: str, job: str, name: str) -> None:
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
        if not files.exists(recorded):
            files.write_json(recorded, settings)
            return
        before = cast(dict[str, Any], files.read_json(recorded))
        differing = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if differing:
            shown = ", ".join(f"{key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in differing)
            raise CirError(
                f"run {self.name!r} exists in {self.parent} with other settings ({shown}); "
                "choose another --name, or the old settings to resume it"
            )

    def result(self) -> dict[str, Any] | None:
        """Return what the finished run recorded, None if it has not finished."""
        marker = self.path("result.json")
        return cast(dict[str, Any], files.read_json(marker)) if files.exists(marker) else None

    def commit(self, result: dict[str, Any]) -> None:
        """Mark the run as finished; written last."""
        files.write_json(self.path("result.json"), result)
