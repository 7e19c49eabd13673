"""What a process imports decides how soon it starts: seconds for a help text, many processes for every job."""

import subprocess
import sys
import threading
from typing import get_args

import pytest

from cir_core.composition import METHODS
from cir_core.schema import CirError
from jobs.batch_retrieve import Method
from jobs.training_data import started
from jobs.training_worker import MistakesAreFinal

STARTED_OFTEN = "jobs.tat_train jobs.embed jobs.batch_retrieve jobs.decoding jobs.training_data cir_core.encoders"
STARTED_OFTEN += " jobs.catalogue_checks jobs.catalogue_lookup"
DRIVERS = "jobs.catalogue_job jobs.training_job jobs.embedding_job jobs.retrieval_job jobs.training_worker"


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (STARTED_OFTEN, {"torch", "open_clip", "transformers", "peft", "mlflow"}),
        (DRIVERS, {"open_clip", "transformers", "peft"}),
    ],
)
def test_no_process_imports_model_libraries_that_it_does_not_need(modules, unwanted):
    code = f"import sys, {modules.replace(' ', ', ')}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert unwanted.isdisjoint(loaded)


def test_the_methods_of_the_settings_are_those_of_the_library():
    assert get_args(Method) == tuple(METHODS)


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
