"""One typed model per job, filled from defaults, a YAML file, the environment and the command line, later ones winning.

    python jobs/tat_train.py --config my_run.yaml --lr 2e-4        # --help lists every field
    CIR_TAT_TRAIN_LR=2e-4 python jobs/tat_train.py
    python jobs/tat_train.py --lr 2e-4 --print_config > my_run.yaml

jsonargparse does the reading; this module says how our models are declared and how its complaints are worded.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from cir_core.files import redact
from cir_core.schema import CirError


def public(value: Any) -> Any:
    """Return `value` with the credentials of every URI in it left out: fit for a record, a screen or a log.

    >>> public({"data": ["s3://key:secret@bucket/shards"], "seed": 1})
    {'data': ['s3://bucket/shards'], 'seed': 1}
    """
    if isinstance(value, str):
        return redact(value) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return value


class JobConfig(BaseModel):
    """What every job has. Frozen, unknown keys refused; field names follow the libraries they feed.

    Its JSON form (`model_dump(mode="json")`, `model_dump_json`) and its repr are for records and hold no credentials of
    URIs; the attributes and `model_dump()` hold what was given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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

    @field_serializer("*", when_used="json")
    def _recorded(self, value: Any) -> Any:
        return public(value)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(key, public(value)) for key, value in super().__repr_args__()]

    def digest(self, exclude: Sequence[str] = ()) -> str:
        """Return eight hex digits that change with any field that can change the result; credentials cannot."""
        where = {"tracking_uri", "experiment", "storage_path", *exclude}
        text = json.dumps(self.model_dump(mode="json", exclude=where), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


Config = TypeVar("Config", bound=JobConfig)


def parse_config(model: type[Config], job: str, description: str, argv: Sequence[str] | None = None) -> Config:
    """Fill a job's model from its sources. `--help` and `--print_config` print and exit with 0.

    Args:
        model: the job's configuration model.
        job: the job's name; the environment prefix is `CIR_<JOB>_`.
        description: first lines of `--help`.
        argv: arguments without the program's name; sys.argv by default.

    Raises:
        CirError: an unknown key, a value of the wrong type or out of range, an unreadable YAML file. One line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prefix = f"CIR_{job.upper()}"
    _refuse_unknown_variables(prefix, model)
    parser = _parser(model, job, description, prefix)
    file, settings = _settings_file(arguments, prefix, model)
    sources = _Sources(arguments, prefix, file, settings)
    try:
        parser.set_defaults(settings)
        values = parser.parse_args(arguments).as_dict()
        show = values.pop("print_config")
        values.pop("config")
        config = model(**values)
    except (ArgumentError, TypeError) as error:
        raise CirError(_reworded(str(error), model, sources)) from None
    except ValidationError as error:
        raise CirError("; ".join(_reworded_item(item, model, sources) for item in error.errors())) from None
    if show:
        sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        sys.exit(0)
    return config


def _parser(model: type[JobConfig], job: str, description: str, prefix: str) -> ArgumentParser:
    class Help(DefaultHelpFormatter):  # type: ignore[misc]
        """Says types in words."""

        def _get_type_str(self, action: argparse.Action) -> str | None:
            return _expected(_schema(model, action.dest)) if action.dest in model.model_fields else None

    parser = ArgumentParser(
        prog=f"{job}.py",
        description=description,
        env_prefix=prefix,
        default_env=True,
        exit_on_error=False,
        allow_abbrev=False,  # --num_worker must not pass for --num_workers
        print_config=None,  # jsonargparse's own writes credentials
        formatter_class=Help,
        usage="%(prog)s [--config FILE] [--field value ...]",
    )
    parser.add_argument("--config", help="YAML file with any of the fields below.")
    parser.add_argument("--print_config", action="store_true", help="Print the settings as YAML and stop.")
    parser.add_class_arguments(model, None)
    return parser


def _refuse_unknown_variables(prefix: str, model: type[JobConfig]) -> None:
    """Raise CirError for CIR_<JOB>_* variables that set nothing."""
    known = [*model.model_fields, "config", "print_config"]
    # Kubernetes puts such variables into every pod for a service that is called, say, cir-embed.
    service = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_[A-Z]+(_(PROTO|PORT|ADDR))?)?)$")
    for name in os.environ:
        field = name.removeprefix(f"{prefix}_")
        if field == name or service.search(name) or (field.isupper() and field.lower() in known):
            continue
        near = _near(field.lower(), known)
        raise CirError(f"environment variable {name} sets no field{near}; fields are in capitals; --help lists them")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key occurs once and 1e-4 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a second value for a key is an error."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{', '.join(twice)} set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _settings_file(arguments: list[str], prefix: str, model: type[JobConfig]) -> tuple[str, dict[str, Any]]:
    """Return the name of the YAML file that --config or CIR_<JOB>_CONFIG gives, and what it sets; ("", {}) without one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", default=os.environ.get(f"{prefix}_CONFIG"))
    try:
        name = first.parse_known_args(arguments)[0].config
    except ArgumentError as error:
        raise CirError(str(error)) from None
    if name is None:
        return "", {}
    try:
        with Path(name).open(encoding="utf-8") as stream:
            found = yaml.load(stream, _StrictLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CirError(
            f"config: cannot read {name!r} ({reason}); expected a YAML file with lines such as `lr: 2e-4`"
        ) from None
    except yaml.YAMLError as error:
        raise CirError(f"config: {name!r} is not sound YAML: {_one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise CirError(f"config: {name!r} must hold lines such as `lr: 2e-4`, found {_found(found)}")
    known = list(model.model_fields)
    unknown = [f"{key!r}{_near(str(key), known)}" for key in found if key not in known]
    if unknown:
        raise CirError(f"config: {name!r} sets unknown fields: {', '.join(unknown)}; --help lists every field")
    return name, found


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class _Sources:
    """Where values came from, so that a message can say which one is wrong."""

    arguments: Sequence[str]
    prefix: str
    file: str
    settings: Mapping[str, Any]

    def named(self, name: str, found: str) -> str:
        """Return the field's name, with the variable or file that set it; the command line is before its user's eyes."""
        variable = f"{self.prefix}_{name}".upper()
        if found == os.environ.get(variable):
            return f"{name} ({variable})"  # jsonargparse checks it even if the command line sets the field as well
        if any(argument.partition("=")[0].strip("-+") == name for argument in self.arguments):
            return name
        place = variable if variable in os.environ else self.file if name in self.settings else ""
        return f"{name} ({place})" if place else name

    def only_file(self, name: str) -> bool:
        """Whether the YAML file alone can have set this field."""
        return name in self.settings and self.named(name, "").endswith(f"({self.file})")


def _near(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=2, cutoff=0.7)
    return f" (did you mean {' or '.join(dashes + match for match in close)}?)" if close else ""


def _found(value: Any) -> str:
    return "nothing" if value is None else repr(public(value))[:200]


def _reworded(message: str, model: type[JobConfig], sources: _Sources) -> str:
    """Make jsonargparse's message one line that says the field, where it was set, what was expected, what was found."""
    known = list(model.model_fields)
    if rest := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = rest[1].split()
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not flags:
            return (
                f"unexpected argument {_found(words[0])}: settings are given as --field value; --help lists every field"
            )
        named = [flag + _near(flag.lstrip("-"), known, "--") for flag in flags]
        return f"unknown {'flag' if len(flags) == 1 else 'flags'} {', '.join(named)}; --help lists every field"
    field = re.search(r'Parser key "(\w+)|argument --(\w+)', message)
    name = field[1] or field[2] if field else ""
    if name not in known:
        return _one_line(message)
    value = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    found = _one_line(value[1]) if value else ""
    expected = _expected(_schema(model, name))
    quotes = " in quotes" if expected.startswith("text") and sources.only_file(name) else ""
    shown = _found(found) if value else "no value"
    return f"{sources.named(name, found)}: expected {expected}{quotes}, found {shown}"


def _reworded_item(item: Any, model: type[JobConfig], sources: _Sources) -> str:
    """Word one of pydantic's errors: a validator's own message as it is, the others as those of jsonargparse."""
    text = str(item["msg"]).removeprefix("Value error, ")
    name = str(item["loc"][0]) if item["loc"] else ""
    if text.startswith(name):
        return text
    named = sources.named(name, str(item["input"]))
    if item["type"] == "value_error" or name not in model.model_fields:
        return f"{named}: {text} (found {_found(item['input'])})"
    expected = "a finite number" if item["type"] == "finite_number" else _expected(_schema(model, name))
    return f"{named}: expected {expected}, found {_found(item['input'])}"


def _schema(model: type[JobConfig], name: str) -> dict[str, Any]:
    """Return the JSON schema of one field."""
    found: dict[str, Any] = model.model_json_schema()["properties"][name]
    return found


_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": 'a mapping such as {"name": "value"}',
}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def _expected(schema: Mapping[str, Any]) -> str:
    """Say in words which values a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_expected(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "prefixItems" in schema:
        return f"a list [{', '.join(_expected(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        empty = "" if schema.get("minItems", 0) == 0 else "non-empty "
        return f"a {empty}list such as [a, b], each {_expected(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
    words = _WORDS.get(schema.get("type", ""), "a value")
    if not bounds and schema.get("type") == "number":
        words = "a finite number"
    return f"{words} {' and '.join(bounds)}".strip()


def resolve_precision(precision: str, *, use_gpu: bool) -> str:
    """Return what "auto" means to `load_encoder` where the job runs: "fp32" or "bf16"; others as they are."""
    return ("bf16" if use_gpu else "fp32") if precision == "auto" else precision


def repository_root() -> Path:
    """Return the folder that holds jobs/ and cir_core/."""
    return Path(__file__).resolve().parent.parent


def flat_parameters(config: JobConfig) -> dict[str, Any]:
    """Return the resolved configuration as MLflow parameters: name -> value, lists and mappings as JSON."""
    dumped = config.model_dump(mode="json")
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in dumped.items()}
