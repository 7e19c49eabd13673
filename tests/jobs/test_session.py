"""Exit codes and messages, what a CirError looks like after Ray wrapped it, signals, versions. No cluster."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from cir_core.schema import CirError
from jobs import config, session


class OwnError(CirError):
    """Subclasses are input mistakes too."""


def left_with(main, capsys) -> tuple[int, str]:
    """Run a job's main; return the exit code and what stderr holds."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            session.run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(left.value.code), capsys.readouterr().err


def raises(error: BaseException):
    def main() -> None:
        raise error

    return main


def from_a_task(cause: Exception) -> Exception:
    """Return what `ray.get` raises for a task that raised `cause`; it has crossed processes as a pickle."""
    wrapped = RayTaskError("f", f"Traceback ...\n{type(cause).__name__}: {cause}", cause, "ray::f", 1, "127.0.0.1")
    return pickle.loads(pickle.dumps(wrapped)).as_instanceof_cause()  # noqa: S301 - our own


def test_a_job_that_is_done_returns(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        session.run(lambda: session.say("hello"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize("error", [CirError("no such shard: x"), OwnError("no such shard: x")])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, error):
    assert left_with(raises(error), capsys) == (2, "error: no such shard: x\n")


@pytest.mark.parametrize(
    "wrap",
    [
        from_a_task,
        lambda error: WorkerGroupError("Rank 0: Traceback ...", {0: RuntimeError("collective aborted"), 1: error}),
        lambda error: WorkerGroupError("Rank 1: Traceback ...", {1: from_a_task(error)}),
        lambda error: ControllerError(from_a_task(error)),
        lambda error: from_a_task(WorkerGroupError("Rank 0: Traceback ...", {0: error})),
        lambda error: from_a_task(
            type(error)(f"{error}\nFailed to apply UDF transform after 1/1 attempts (...).\nTo change")
        ),
    ],
)
def test_a_mistake_found_in_a_worker_is_the_same_line(capsys, wrap):
    for error in (CirError("no such shard: x"), OwnError("no such shard: x")):
        assert left_with(raises(wrap(error)), capsys) == (2, "error: no such shard: x\n")


def test_a_mistake_behind_another_error_is_told(capsys):
    def main() -> None:
        try:
            raise CirError("bad input")
        except CirError as error:
            raise RuntimeError("while reading") from error

    assert left_with(main, capsys) == (2, "error: bad input\n")


def test_an_error_that_only_happened_beside_a_mistake_is_not_the_mistake(capsys):
    def main() -> None:
        try:
            raise CirError("tried and handled")
        except CirError:
            raise RuntimeError("a bug in the handler")  # noqa: B904 - implicit context is the case here

    code, text = left_with(main, capsys)
    assert code == 1
    assert text.splitlines()[-1].startswith("error: RuntimeError: a bug in the handler")


@pytest.mark.parametrize("wrap", [lambda error: error, from_a_task])
def test_a_crash_is_a_traceback_a_last_line_and_exit_code_1(capsys, wrap):
    code, text = left_with(raises(wrap(RuntimeError("disk full\nmore"))), capsys)
    assert code == 1
    assert "Traceback" in text
    assert text.splitlines()[-1] == (
        "error: RuntimeError: disk full (traceback above); the same command continues where this one stopped"
    )


def test_a_crash_without_a_message(capsys):
    code, text = left_with(raises(ValueError()), capsys)
    assert code == 1
    assert text.splitlines()[-1].startswith("error: ValueError:  (traceback above)")


def test_ctrl_c_is_one_line_and_exit_code_1(capsys):
    code, text = left_with(raises(KeyboardInterrupt()), capsys)
    assert (code, text) == (1, "stopped; the same command continues where this one stopped\n")


def test_a_circle_of_causes_ends():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(session.causes(first)) == [first, second]


JOB = """
import signal, sys, time
from jobs import session

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes inherit that it is ignored

def main():
    try:
        session.say("working")
        time.sleep(60)
    finally:
        session.say("cleaning up")
        if len(sys.argv) > 1:
            time.sleep(60)

session.run(main)
"""


def start_job(*arguments: str) -> subprocess.Popen[str]:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "working\n"
    return job


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, "stopped by SIGTERM;"), (signal.SIGINT, "stopped;")])
def test_a_stopped_job_cleans_up_and_says_so(number, words):
    job = start_job()
    job.send_signal(number)
    out, err = job.communicate(timeout=20)
    assert out == "cleaning up\n"
    assert err == f"{words} the same command continues where this one stopped\n"
    assert job.returncode == 1


def test_a_second_sigterm_ends_a_clean_up_that_hangs():
    job = start_job("hang")
    job.send_signal(signal.SIGTERM)
    assert job.stdout is not None
    assert job.stdout.readline() == "cleaning up\n"
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == -signal.SIGTERM


# The version


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with one commit in which the code seems to lie."""
    identity = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, env={**os.environ, **identity})
    monkeypatch.setattr(session, "repository_root", lambda: tmp_path)
    return tmp_path


def test_the_version_names_the_commit_and_a_changed_file(checkout):
    found = session.code_version()
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert found.partition("+")[2] == commit.stdout[:12]
    (checkout / "a").write_text("1")
    subprocess.run(["git", "-C", str(checkout), "add", "a"], check=True)
    assert session.code_version() == f"{found}-dirty"


def test_a_git_hook_s_variables_do_not_name_another_repository(checkout, monkeypatch):
    found = session.code_version()
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert session.code_version() == found


def test_code_inside_somebody_else_s_checkout_has_no_commit(checkout, monkeypatch):
    installed = checkout / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(session, "repository_root", lambda: installed)
    assert "+" not in session.code_version()


def test_without_git_or_a_sound_repository_there_is_the_version_alone(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert "+" not in session.code_version()
    monkeypatch.undo()
    monkeypatch.setattr(session, "repository_root", lambda: checkout)
    shutil.rmtree(checkout / ".git" / "objects")
    assert "+" not in session.code_version()


def test_code_that_is_not_installed_has_a_version_too(tmp_path):
    """As `python jobs/x.py` in an unpacked archive, without the package's metadata."""
    copy = tmp_path / "code"
    for name in ("jobs", "cir_core"):
        shutil.copytree(
            config.repository_root() / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "models")
        )
    code = """
        import importlib.metadata as m
        kept = m.version
        def version(name):
            if name == "slerp-tat":
                raise m.PackageNotFoundError(name)
            return kept(name)
        m.version = version
        from jobs import session
        assert session.__file__.startswith("%s"), session.__file__
        print(session.code_version())
    """
    script = copy / "show.py"
    script.write_text(textwrap.dedent(code) % copy)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0+source\n"


# Ray


def test_an_address_where_nothing_listens_is_told_in_seconds(monkeypatch):
    connected_before = ray.is_initialized()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for name in session._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session.ray_constants, "ENABLE_RAY_CLUSTER", session.ray_constants.ENABLE_RAY_CLUSTER)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with pytest.raises(CirError, match=rf"no Ray cluster at {address}: .*refused.*make up.*RAY_ADDRESS"):
        session.connect()
    assert ray.is_initialized() == connected_before


@pytest.mark.parametrize(
    ("variable", "written", "expected"),
    [
        (None, None, None),
        ("local", "10.0.0.1:6379", None),
        (None, "10.0.0.1:6379\n", "10.0.0.1:6379"),
        ("auto", "127.0.0.1:6379", "127.0.0.1:6379"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
    ],
)
def test_the_running_cluster_is_found_as_ray_finds_it(tmp_path, monkeypatch, variable, written, expected):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    if written:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(written)
    assert session._running_cluster() == expected


def test_the_names_of_ray_s_and_mlflow_s_variables_exist():
    """A renamed variable would bring the noise back without a word."""
    from mlflow import environment_variables
    from ray.data._internal import logging as data_logging
    from ray.train.v2._internal import constants

    known = {constants.ENABLE_PRINT_PATCH_ENV_VAR, constants.V2_ENABLED_ENV_VAR}
    known |= {name for name in dir(environment_variables) if name.startswith("MLFLOW_")}
    modules = (data_logging, ray.data.context, ray._private.worker)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    for name in session._ENVIRONMENT:
        assert name in known or name in source, name


def test_ray_data_s_notes_and_tracebacks_stay_in_its_file(monkeypatch):
    logger, shown = logging.getLogger("ray.data"), io.StringIO()
    progress = logging.getLogger("ray.data._internal.progress")
    monkeypatch.setattr(progress, "level", progress.level)
    assert ray.data  # importing it adds its handlers; pytest adds its own
    for handler in logger.handlers:
        monkeypatch.setattr(handler, "filters", handler.filters)
    (console,) = [handler for handler in logger.handlers if type(handler).__name__ == "PlainRayHandler"]
    monkeypatch.setattr(console, "stream", shown)
    session._quiet_ray_data()
    logger.info("Starting execution")
    logger.error("An exception was raised", exc_info=ValueError("x"))
    logger.warning("the object store is full")
    progress.warning("Progress bars disabled")
    assert [line.rpartition(" -- ")[2] for line in shown.getvalue().splitlines()] == ["the object store is full"]


ON_THE_CLUSTER = """
import sys
import ray, ray.data
from cir_core.schema import CirError
from jobs import session

@ray.remote(num_cpus=0)
def task(word):
    print("a worker's line", flush=True)
    raise CirError("no such shard: x") if word == "mistake" else RuntimeError("disk full")

def block(batch, word):
    raise CirError("no such shard: x") if word == "mistake" else RuntimeError("disk full")

def main():
    session.connect()
    session.check_resources({"CPU": 1})
    session.say("connected")
    if sys.argv[1] == "task":
        ray.get(task.remote(sys.argv[2]))
    ray.data.range(1, override_num_blocks=1).map_batches(block, num_cpus=0.1, fn_args=[sys.argv[2]]).materialize()

session.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["task", "data"])
@pytest.mark.parametrize("what", ["mistake", "crash"])
def test_what_a_worker_raises_reaches_the_user_once(servers, tmp_path, where, what):
    """The driver runs in a shell that knows nothing of the head but its address on loopback."""
    script = tmp_path / "job.py"
    script.write_text(ON_THE_CLUSTER)
    environment = servers.environment()
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    command = [sys.executable, str(script), where, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    out = [line for line in done.stdout.splitlines() if "a worker's line" not in line]
    assert out == ["connected"]
    assert done.stdout.count("a worker's line") <= 1
    if what == "mistake":
        assert (done.returncode, done.stderr) == (2, "error: no such shard: x\n")
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: RuntimeError: disk full (traceback above)")


ALONE = """
import ray
import ray.util.state

from jobs import session

session.connect()

@ray.remote(num_cpus=0)
class Actor:
    def state(self):
        return ray.util.state.get_actor(ray.get_runtime_context().get_actor_id()).state  # as Ray Train's own actors ask

print(ray.get(Actor.remote().state.remote()))
"""


@pytest.mark.slow
def test_a_cluster_of_its_own_is_not_mistaken_for_another_one_that_runs(servers):
    """`python jobs/...` beside `make up`: Ray Train's actors failed, as they found two clusters."""
    environment = servers.environment()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "ALIVE\n"), done.stderr


CPUS = """
import ray
from jobs.session import node_cpus

print(node_cpus())
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(node_cpus).remote()))
"""


@pytest.mark.slow
def test_a_process_takes_no_more_cpus_than_ray_has_for_its_node():
    """In a container with a limit the process sees all cores of the machine, and so many threads would be throttled."""
    done = subprocess.run([sys.executable, "-c", CPUS], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of given resources, as Ray reports them."""

    def given(total, free=None, limit=None):
        monkeypatch.setattr(ray, "cluster_resources", lambda: dict(total))
        monkeypatch.setattr(ray, "available_resources", lambda: dict(total if free is None else free))
        monkeypatch.setattr(session, "_autoscaler_limit", lambda: dict(limit or {}))

    return given


def test_a_cluster_that_is_too_small_names_what_is_missing(cluster):
    cluster({"CPU": 2.0, "memory": 1e9})
    with pytest.raises(CirError) as caught:
        session.check_resources({"CPU": 1, "GPU": 4.0})
    assert str(caught.value) == "the cluster is too small (GPU: needs 4, has 0); use fewer workers or add nodes"


def test_an_autoscaler_that_may_add_enough_is_waited_for(cluster, capsys):
    cluster({"CPU": 2.0}, limit={"CPU": 64, "GPU": 8})
    session.check_resources({"CPU": 10.5, "GPU": 8})
    assert "the cluster has to grow (CPU: needs 10.5, has 2, GPU: needs 8, has 0)" in capsys.readouterr().out
    with pytest.raises(CirError, match=r"too small \(GPU: needs 9, has 8\)"):
        session.check_resources({"CPU": 10.5, "GPU": 9})


@pytest.mark.parametrize("value", ["true", "false"])  # which autoscaler it is
def test_kuberay_s_autoscaler_does_not_say_how_far_it_goes(monkeypatch, capsys, value):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})  # a head without CPUs, no workers yet
    monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.delenv("RAY_enable_autoscaler_v2", raising=False)
    with pytest.raises(CirError, match="too small"):
        session.check_resources({"CPU": 5, "GPU": 8})
    monkeypatch.setenv("RAY_enable_autoscaler_v2", value)
    session.check_resources({"CPU": 5, "GPU": 8})
    assert "the cluster has to grow" in capsys.readouterr().out


def test_resources_that_others_hold_are_named_after_a_wait(cluster):
    cluster({"CPU": 4.0}, free={"CPU": 0.5})
    session.check_resources({"CPU": 0.5}, wait_s=0)
    with pytest.raises(CirError, match=r"no free resources \(CPU: needs 2, free 0\.5\) after 0 s.*ray job list"):
        session.check_resources({"CPU": 2.0}, wait_s=0)


def test_resources_that_become_free_are_taken(monkeypatch, cluster):
    cluster({"CPU": 4.0})
    reports = iter([{}, {"CPU": 1.0}, {"CPU": 4.0}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(reports))
    monkeypatch.setattr(session.time, "sleep", lambda seconds: None)
    session.check_resources({"CPU": 2.0}, wait_s=60)
    assert next(reports, None) is None
