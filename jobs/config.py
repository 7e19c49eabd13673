"""One typed model per job, filled from defaults, a YAML file, the environment and the command line, in that order.

    python jobs/tat_train.py --config my_run.yaml --lr 2e-4        # --help lists every field
    CIR_TAT_TRAIN_LR=2e-4 python jobs/tat_train.py

jsonargparse does the reading; this module only says how our models are declared and how its complaints are worded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cir_core.schema import CirError


class JobConfig(BaseModel):
    """What every job has. Frozen, unknown keys refused; field names follow the libraries they feed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage_path: str = Field(
        ".run/storage",
        description="Folder or URI (s3://bucket/prefix) under which everything this job makes is kept. "
        "A relative path counts from the working directory of the job.",
    )
    tracking_uri: str = Field(
        "",
        description="MLflow tracking server, e.g. http://mlflow:5000. Empty: MLFLOW_TRACKING_URI, else "
        "http://127.0.0.1:5000.",
    )
    experiment: str = Field("slerp-tat", description="MLflow experiment; made if absent.")

    def digest(self, exclude: Sequence[str] = ()) -> str:
        """Return eight hex digits that change with any field that can change the result."""
        where = {"tracking_uri", "experiment", "storage_path", *exclude}
        text = json.dumps(self.model_dump(mode="json", exclude=where), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


Config = TypeVar("Config", bound=JobConfig)


def _reworded(message: str, known: Sequence[str]) -> str:
    """Make jsonargparse's message one line that says what was expected, and name near matches of unknown flags."""
    message = re.sub(r"\s*For further information visit \S+?(?=\. Got|\s|$)", "", message)
    message = re.sub(r"\d+ validation errors? for \S+\s*|\[type=[^\]]*\]\s*\.?", "", message)
    message = re.sub(r"\s+", " ", message).strip()
    unknown = re.findall(r"--?([A-Za-z_][\w-]*)|Option '([^']+)'", message)
    if "unrecognized" in message or "is not accepted" in message:
        names = [flag or option for flag, option in unknown]
        near = [match for name in names for match in difflib.get_close_matches(name, known, n=2)]
        message += f"; did you mean {' or '.join('--' + name for name in near)}?" if near else ""
        message += "; --help lists every field"
    return message


def parse_config(model: type[Config], job: str, description: str, argv: Sequence[str] | None = None) -> Config:
    """Fill a job's model from its sources.

    Args:
        model: the job's configuration model.
        job: the job's name; the environment prefix is `CIR_<JOB>_`.
        description: first lines of `--help`.
        argv: arguments without the program's name; sys.argv by default.

    Raises:
        CirError: an unknown key, a value of the wrong type or out of range, an unreadable YAML file.
    """
    parser = ArgumentParser(
        prog=f"{job}.py",
        description=description,
        env_prefix=f"CIR_{job.upper()}",
        default_env=True,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(model, None)
    known = list(model.model_fields)
    try:
        values = parser.parse_args(list(sys.argv[1:] if argv is None else argv)).as_dict()
        values.pop("config", None)
        return model(**values)
    except (ArgumentError, TypeError) as error:
        raise CirError(_reworded(str(error), known)) from None
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']} (got {item.get('input')!r})"
            if item["loc"]
            else str(item["msg"]).removeprefix("Value error, ")
            for item in error.errors()
        )
        raise CirError(found) from None


def repository_root() -> Path:
    """Return the folder that holds jobs/ and cir_core/."""
    return Path(__file__).resolve().parent.parent


def flat_parameters(config: JobConfig) -> dict[str, Any]:
    """Return the resolved configuration as MLflow parameters: name -> value, lists as JSON."""
    dumped = config.model_dump(mode="json")
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in dumped.items()}
