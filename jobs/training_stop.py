"""Checkpoints before their time: when a machine of the workers is about to go, and when the job is told to stop.

A spot machine's notice, `kubectl drain` and a pod's SIGTERM reach the workers through Ray (`ray.train.get_preemption_info`);
Ctrl-C, `ray job stop` and a head's preStop hook reach the driver, which tells the workers and waits for their checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import ray
import ray.actor
import ray.train
import ray.train.collective

from jobs.session import say

_ASK_EVERY_S = 2.0
_STOP_WAIT_S = 60.0  # for the workers' last step and checkpoint, where RAY_JOB_STOP_WAIT_TIME_S says nothing else
_SPARE_S = 5.0  # of that, for what the driver has to do afterwards


class StopNotice:
    """Between the driver and rank 0: whether the job is to stop, and the checkpoint that was written since."""

    def __init__(self) -> None:
        self._stopping, self._training = False, False
        self._saved: int | None = None

    def stop(self) -> bool:
        """Have the workers checkpoint soon; returns whether any are training, so whether there is anything to wait for."""
        self._stopping = True
        return self._training

    def stopping(self) -> bool:
        """Whether `stop` was called. Asked by workers in training."""
        self._training = True
        return self._stopping

    def saved(self, step: int) -> None:
        """Take note of a checkpoint that was written because of `stop`."""
        self._saved = step

    def saved_step(self) -> int | None:
        """Return the step of that checkpoint, None before."""
        return self._saved


def stop_notice() -> ray.actor.ActorHandle:
    """Start a StopNotice on this node, which the driver's end takes away."""
    here = ray.get_runtime_context().get_node_id()
    return ray.remote(num_cpus=0, label_selector={"ray.io/node-id": here})(StopNotice).remote()


def run_until_stopped(work: Callable[[], object], notice: ray.actor.ActorHandle) -> None:
    """Run `work`; told to stop meanwhile, wait until the workers have checkpointed, then stop.

    Work is done by another thread: Ray Train would answer SIGINT in the main thread by ending its workers at once.

    Raises:
        KeyboardInterrupt: SIGINT, or SIGTERM as `jobs.session.Stopped`; a second one ends the wait.
        Exception: what `work` raised.
    """
    errors: list[BaseException] = []
    ended = threading.Event()  # Thread.is_alive is wrong once a signal has interrupted Thread.join

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        ended.set()

    threading.Thread(target=run, name="training", daemon=True).start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        _wait_for_checkpoint(notice, ended)
        raise
    if errors:
        raise errors[0]


def _wait_for_checkpoint(notice: ray.actor.ActorHandle, ended: threading.Event) -> None:
    allowed = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S") or _STOP_WAIT_S) - _SPARE_S
    deadline = time.monotonic() + allowed
    if not ray.get(notice.stop.remote()):
        return
    say("stopping: the workers write a checkpoint first")
    while time.monotonic() < deadline:
        step = ray.get(notice.saved_step.remote())
        if step is not None:
            say(f"the checkpoint of step {step} is written")
            return
        if ended.wait(0.1):
            return
    say("no checkpoint came in time; the last one stands")


class EarlyCheckpoints:
    """Tells one worker when a checkpoint is due before its time, every worker of a group at the same step.

    Workers agree by asking Ray Train together, which takes milliseconds: about every two seconds, however long a step is.
    """

    def __init__(self, notice: ray.actor.ActorHandle, first: int) -> None:
        """Begin at step `first`, which is checkpointed."""
        self._notice = notice
        self._leads = ray.train.get_context().get_world_rank() == 0
        self._asked_at, self._asked_step = time.monotonic(), first
        self._next = first + 1
        self._known: set[str] = set()
        self._stopping = False

    def due(self, done: int) -> bool:
        """Whether to checkpoint `done` steps now. To be called by every worker after every step."""
        if done < self._next:
            return False
        preempted = ray.train.get_preemption_info()
        told = None
        if self._leads:
            now = time.monotonic()
            steps = (done - self._asked_step) * _ASK_EVERY_S / max(now - self._asked_at, 1e-6)
            self._asked_at, self._asked_step = now, done
            told = (bool(ray.get(self._notice.stopping.remote())), done + max(1, int(steps)))
        self._stopping, self._next = ray.train.collective.broadcast_from_rank_zero(told)
        reasons = set(preempted.preempted_node_ids if preempted else ()) | ({"stop"} if self._stopping else set())
        new = reasons - self._known
        self._known = reasons
        if new and self._leads:
            say(f"step {done}: {'the job is to stop' if self._stopping else 'a machine is about to go'}, checkpoint")
        return bool(new)

    def written(self, done: int) -> None:
        """Tell the driver, if it waits for it, that the checkpoint of `done` steps is written."""
        if self._stopping and self._leads:
            self._notice.saved.remote(done)
