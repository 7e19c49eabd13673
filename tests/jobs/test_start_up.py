"""What a process imports decides how soon it starts: seconds for a help text, many processes for every job."""

import subprocess
import sys
import threading
import time
from typing import get_args

import pytest

from cir_core.composition import METHODS
from cir_core.schema import CirError
from jobs.batch_retrieve import Method
from jobs.start_up import StartUp
from jobs.training_data import started
from jobs.training_worker import MistakesAreFinal

STARTED_OFTEN = "jobs.tat_train jobs.embed jobs.batch_retrieve jobs.decoding jobs.training_data cir_core.encoders"
STARTED_OFTEN += " jobs.catalogue_checks jobs.catalogue_lookup"
DRIVERS = "jobs.catalogue_job jobs.training_job jobs.embedding_job jobs.retrieval_job jobs.training_worker"


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (STARTED_OFTEN, {"torch", "open_clip", "transformers", "peft", "mlflow"}),
        (DRIVERS, {"open_clip", "transformers", "peft", "matplotlib"}),
    ],
)
def test_no_process_imports_model_libraries_that_it_does_not_need(modules, unwanted):
    code = f"import sys, {modules.replace(' ', ', ')}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert unwanted.isdisjoint(loaded)


def test_the_methods_of_the_settings_are_those_of_the_library():
    assert get_args(Method) == tuple(METHODS)


def test_stages_are_the_times_between_moments():
    start = StartUp([("process", 100.0), ("imports", 102.5), ("model", 102.51), ("first step", 110.0)])
    assert start.seconds() == {"imports": 2.5, "model": 0.01, "first step": 7.49, "total": 10.0}
    assert str(start) == "10.0 s (imports 2.5, first step 7.5)"
    assert start.record() == {"process_began": 100.0, "start_up": [list(pair) for pair in start.seconds().items()]}


def test_a_start_begins_with_its_process():
    before, here = time.time(), StartUp()
    here.reached("now")
    assert here.moments[0][1] <= before <= here.moments[1][1]
    there = StartUp(tuple(here.moments))  # in another process
    there.reached("later")
    assert list(there.seconds()) == ["now", "later", "total"]
    assert list(here.seconds()) == ["now", "total"]


def test_the_first_item_is_asked_for_at_once():
    asked, go_on = threading.Event(), threading.Event()

    def source():
        asked.set()
        go_on.wait(10)
        yield from (1, 2, 3)

    items = started(source())
    assert asked.wait(10)
    go_on.set()
    assert list(items) == [1, 2, 3]
    assert list(started(iter(()))) == []


@pytest.mark.parametrize("good", [0, 2])
def test_an_error_of_the_source_comes_in_its_place(good):
    def source():
        yield from range(good)
        raise OSError("gone")

    items = started(source())
    assert [next(items) for _ in range(good)] == list(range(good))
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_only_a_mistake_is_final():
    callback = MistakesAreFinal()
    callback.after_exception(None, {0: RuntimeError("a lost connection"), 1: ValueError("x")})
    wrapped = RuntimeError("worker failed")
    wrapped.__cause__ = CirError("the loss is not finite")
    with pytest.raises(CirError, match="the loss is not finite"):
        callback.after_exception(None, {0: RuntimeError("another"), 1: wrapped})
