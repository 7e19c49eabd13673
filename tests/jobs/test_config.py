"""Precedence, wording of mistakes, digests and what is recorded, on a small model that has every kind of field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from cir_core.schema import CirError
from jobs.config import JobConfig, flat_parameters, parse_config, public


class Demo(JobConfig):
    """Fields of every kind that the jobs use."""

    lr: PositiveFloat = Field(1e-4, description="Learning rate.")
    epochs: PositiveInt = Field(1, description="Passes.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Dropout.")
    scale: float = Field(1.0, description="Any number.")
    data: str = Field("scenes", description="Shards.")
    pretrained: str | None = Field(None, description="Weights tag.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Arithmetic.")
    use_gpu: bool = Field(False, description="One GPU.")
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(1, description="Workers or [min, max].")
    target_modules: list[str] = Field(["q_proj", "v_proj"], description="Layers.")
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.5], description="Text weights.")
    protocol: dict[str, Any] = Field({}, description="Options.")

    @field_validator("target_modules")
    @classmethod
    def _some(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("name at least one layer")
        return names

    @model_validator(mode="after")
    def _in_order(self) -> Demo:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers {list(self.num_workers)} must be [min, max]")
        return self


def parse(*argv: str) -> Demo:
    return parse_config(Demo, "demo", "A job.", list(argv))


def complaint(*argv: str) -> str:
    with pytest.raises(CirError) as caught:
        parse(*argv)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    assert "http" not in text
    return text


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CIR_DEMO_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run_yaml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_later_sources_win(run_yaml, monkeypatch):
    path = run_yaml("lr: 0.1\nepochs: 2\nscale: 3\ndata: yaml\n")
    monkeypatch.setenv("CIR_DEMO_EPOCHS", "20")
    monkeypatch.setenv("CIR_DEMO_SCALE", "30")
    for argv in (["--config", path, "--scale", "300"], ["--scale=300", f"--config={path}"]):  # in any order
        found = parse(*argv)
        assert (found.lr, found.epochs, found.scale, found.data) == (0.1, 20, 300.0, "yaml")
        assert found.precision == "auto"
    monkeypatch.setenv("CIR_DEMO_CONFIG", path)
    assert (parse().lr, parse().epochs) == (0.1, 20)
    (Path(path).parent / "other.yaml").write_text("lr: 0.2\n")
    assert parse("--config", str(Path(path).parent / "other.yaml")).lr == 0.2


def test_values_of_every_kind(run_yaml):
    argv = ["--num_workers", "[1, 4]", "--target_modules", "[a, b]", "--alphas", "[0, 0.5]", "--use_gpu", "true"]
    argv += ["--pretrained", "openai", "--protocol", '{"reference": "kept"}', "--lr", "2e-4"]
    text = "num_workers: [1, 4]\ntarget_modules: [a, b]\nalphas: [0, 5e-1]\nuse_gpu: true\npretrained: openai\n"
    text += "protocol: {reference: kept}\nlr: 2e-4\n"
    for found in (parse(*argv), parse("--config", run_yaml(text))):
        assert found.num_workers == (1, 4)
        assert found.target_modules == ["a", "b"]
        assert found.alphas == [0.0, 0.5]
        assert (found.use_gpu, found.pretrained, found.lr) == (True, "openai", 2e-4)
        assert found.protocol == {"reference": "kept"}
    assert parse("--pretrained", "null").pretrained is None
    assert parse("--data", "123").data == "123"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "abc"], ["lr:", "a number above 0", "found 'abc'"]),
        (["--lr", "-1"], ["lr:", "a number above 0", "'-1'"]),
        (["--lr", "nan"], ["lr:", "nan"]),
        (["--lr", "inf"], ["lr:", "finite", "inf"]),
        (["--scale", "nan"], ["scale:", "finite", "nan"]),
        (["--epochs", "1.5"], ["epochs:", "a whole number above 0", "'1.5'"]),
        (["--dropout", "1"], ["dropout:", "at least 0 and below 1", "'1'"]),
        (["--use_gpu", "maybe"], ["use_gpu:", "true or false", "'maybe'"]),
        (["--use_gpu"], ["use_gpu:", "true or false", "no value"]),
        (["--precision", "fp8"], ["precision:", "one of auto, fp32, bf16", "'fp8'"]),
        (["--num_workers", "two"], ["num_workers:", "a whole number above 0 or a list [", "'two'"]),
        (["--num_workers", "[1, 2, 3]"], ["num_workers:", "or a list [", "[1, 2, 3]"]),
        (["--num_workers", "[4, 1]"], ["num_workers [4, 1] must be [min, max]"]),
        (["--target_modules", "q_proj"], ["target_modules:", "a list such as [a, b], each text", "'q_proj'"]),
        (["--target_modules", "[]"], ["target_modules: name at least one layer", "[]"]),
        (["--alphas", "[0.5, 2]"], ["alphas:", "each a number at least 0 and at most 1"]),
        (["--protocol", "x"], ["protocol:", "a mapping", "'x'"]),
        (["--data"], ["data:", "text", "no value"]),
        (["--learning_rates", "1"], ["unknown flag --learning_rates", "--help"]),
        (["--num-workers", "2"], ["unknown flag --num-workers", "did you mean --num_workers?"]),
        (["--epoch", "2"], ["unknown flag --epoch", "did you mean --epochs?"]),  # no abbreviations
        (["--lrr=1", "--epoch", "2"], ["unknown flags --lrr", "--epoch"]),
        (["extra"], ["unexpected argument 'extra'", "--field value"]),
        (["--lr", "1e-4", "extra"], ["unexpected argument 'extra'"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--config", "/nowhere/run.yaml"], ["config:", "'/nowhere/run.yaml'", "No such file"]),
        (["--config", "/"], ["config:", "'/'", "directory"]),
    ],
)
def test_a_mistake_on_the_command_line_says_field_expectation_and_finding(argv, words):
    text = complaint(*argv)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("yaml_text", "words"),
    [
        ("learnig_rate: 1\nepoch: 2\n", ["unknown fields", "'learnig_rate'", "'epoch' (did you mean epochs?)"]),
        ("lr: abc\n", ["lr (", "run.yaml)", "a number above 0", "'abc'"]),
        ("data: 123\n", ["data (", "text in quotes", "'123'"]),
        ("lr:\n", ["lr (", "found nothing"]),
        ("lr: 1\nlr: 2\n", ["lr set twice", "line 1"]),
        ("lr: [1,\nx: }", ["not sound YAML", "line 2"]),
        ("- 1\n", ["must hold lines such as", "[1]"]),
        ("", ["must hold lines such as", "nothing"]),
        ("lr: !!python/object/apply:os.getcwd []\n", ["not sound YAML", "constructor"]),
        ("config: other.yaml\n", ["unknown fields", "'config'"]),
    ],
)
def test_a_mistake_in_the_yaml_file_names_the_file(run_yaml, yaml_text, words):
    text = complaint("--config", run_yaml(yaml_text))
    assert "run.yaml" in text
    for word in words:
        assert word in text


def test_a_yaml_file_of_bytes_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "not UTF-8" in complaint("--config", str(tmp_path / "run.yaml"))


def test_a_mistake_in_a_variable_names_the_variable(monkeypatch):
    monkeypatch.setenv("CIR_DEMO_LR", "abc")
    assert complaint().startswith("lr (CIR_DEMO_LR): expected a number above 0, found 'abc'")
    assert complaint("--lr", "1").startswith("lr (CIR_DEMO_LR)")  # it is a mistake even where the command line wins
    assert complaint("--lr", "-1").startswith("lr")
    monkeypatch.delenv("CIR_DEMO_LR")
    monkeypatch.setenv("CIR_DEMO_EPOCH", "3")
    assert "CIR_DEMO_EPOCH sets no field (did you mean epochs?)" in complaint()


def test_variables_that_kubernetes_sets_for_a_service_are_no_mistake(monkeypatch):
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"):
        monkeypatch.setenv(f"CIR_DEMO_{name}", "10.0.0.1")
    assert parse() == Demo()


def test_help_shows_every_field_with_type_default_and_variable(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Demo.model_fields.items():
        assert f"--{name}" in text
        assert f"CIR_DEMO_{name.upper()}" in text
        assert str(field.description) in text
        shown = {None: "null"}.get(field.default, str(field.default)) if field.default is None else str(field.default)
        assert f"default: {shown}" in text
    assert "a whole number above 0" in text
    assert "Annotated" not in text


def test_print_config_writes_a_file_that_reads_back(run_yaml, capsys):
    argv = ["--lr", "3e-5", "--num_workers", "[1, 4]", "--pretrained", "openai", "--data", "123"]
    with pytest.raises(SystemExit) as left:
        parse(*argv, "--print_config")
    assert left.value.code == 0
    assert parse("--config", run_yaml(capsys.readouterr().out)) == parse(*argv)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse().lr = 1.0
    with pytest.raises(ValueError, match="Extra inputs"):
        Demo(lrr=1)


def test_the_digest_changes_with_what_can_change_the_result():
    base = Demo()
    assert len(base.digest()) == 8
    for change in ({"lr": 1e-3}, {"num_workers": (1, 2)}, {"protocol": {"a": 1}}, {"data": "x"}, {"alphas": [0.25]}):
        assert Demo(**change).digest() != base.digest()
    for change in ({"storage_path": "/x"}, {"tracking_uri": "http://h"}, {"experiment": "e"}):
        assert Demo(**change).digest() == base.digest()
    assert Demo(lr=1e-3).digest(["lr"]) == base.digest(["lr"])
    assert Demo(data="s3://old:secret@b/x").digest() == Demo(data="s3://b/x").digest()  # new keys, the same data


def test_the_digest_is_the_same_in_another_process():
    code = "from jobs.config import JobConfig as C\nclass D(C):\n  a: dict = {'x': [1.5, None], 'b': 'é'}\nprint(D().digest())"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop()) == 8


SECRETS = {
    "storage_path": "s3://KEYID:hush%2Fhush@bucket/runs",
    "tracking_uri": "https://someone:hush@mlflow.example:5000",
    "data": "s3://KEYID:hush/hush@bucket/{00..09}.tar",
    "protocol": {"where": ["https://someone:hush@h/x?token=hush"]},
}


def test_no_record_holds_credentials():
    config = Demo(**SECRETS)
    records = [
        json.dumps(config.model_dump(mode="json")),
        config.model_dump_json(),
        json.dumps(flat_parameters(config)),
        repr(config),
        str(config),
    ]
    for record in records:
        assert "hush" not in record
        assert "KEYID" not in record
        assert "bucket" in record
        assert "mlflow.example:5000" in record
    for name, value in SECRETS.items():  # what the job works with is what was given
        assert getattr(config, name) == value
        assert config.model_dump()[name] == value


def test_no_message_or_screen_shows_credentials(run_yaml, capsys):
    with pytest.raises(SystemExit):
        parse("--data", SECRETS["data"], "--print_config")
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["data"] == "s3://bucket/{00..09}.tar"
    messages = [complaint("--lr", SECRETS["data"]), complaint(SECRETS["data"])]
    messages += [complaint("--config", run_yaml(f"epochs: '{SECRETS['data']}'\n"))]
    messages += [complaint("--target_modules", SECRETS["data"])]
    for text in [shown, *messages]:
        assert "hush" not in text


def test_flat_parameters_are_one_value_each():
    flat = flat_parameters(Demo(num_workers=(1, 4), protocol={"reference": "kept"}))
    assert flat["num_workers"] == "[1, 4]"
    assert flat["target_modules"] == '["q_proj", "v_proj"]'
    assert flat["protocol"] == '{"reference": "kept"}'
    assert flat["pretrained"] is None
    assert flat.keys() == Demo.model_fields.keys()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_public_leaves_everything_but_uris_alone(value):
    def without(item: Any) -> bool:
        if isinstance(item, str):
            return "://" not in item
        return all(map(without, item.values() if isinstance(item, dict) else item if isinstance(item, list) else []))

    found = public(value)
    assert found == value or not without(value)
    assert public(found) == found
