"""The first moments of a training worker: its data start to flow, then it imports and loads the model.

Importing torch's and open_clip's modules takes as long as the first batches take to arrive, so neither waits for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray.actor
import ray.train
from ray.train import UserCallback

from cir_core.schema import CirError
from cir_core.tuning import TuningSettings
from jobs.session import causes
from jobs.start_up import StartUp
from jobs.storage import newest_state
from jobs.training_data import RunPlan, started, worker_batches


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the driver tells every worker. run_uri: the run's folder; the rest is as in TatTrainConfig.

    start_up: moments of the driver's start, which continues after step `first_step`; a later group of workers says nothing.
    """

    run_uri: str
    train_run_uri: str
    model: str
    pretrained: str | None
    lora: dict[str, Any]
    tuning: TuningSettings
    plan: RunPlan
    tat: dict[str, Any]
    tracking_uri: str
    mlflow_run_id: str
    checkpoint_every_steps: int
    log_every_steps: int
    gap_samples: int
    record_samples: bool
    start_up: tuple[tuple[str, float], ...]
    first_step: int
    notice: ray.actor.ActorHandle


def train_worker(settings: LoopSettings) -> None:
    """Run the loop on this worker; Ray Train calls it on each. Returns when the last step is checkpointed."""
    start_up = StartUp(settings.start_up)
    start_up.reached("workers")
    steps_done, state_uri = newest_state(settings.train_run_uri)
    iterator = ray.train.get_dataset_shard("train")
    batches = iter(()) if steps_done == settings.tuning.total_steps else started(worker_batches(iterator, steps_done))
    from jobs.training_loop import tune  # after the data have been asked for

    start_up.reached("worker imports")
    tune(settings, batches, steps_done, state_uri, start_up)


class MistakesAreFinal(UserCallback):  # type: ignore[misc]
    """Ends a run at once where Ray Train would restart its workers: a CirError does not go away by itself."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raise the first CirError among the workers' errors. Called by Ray Train's controller."""
        for error in worker_exceptions.values():
            for cause in causes(error):
                if isinstance(cause, CirError):
                    raise CirError(str(cause))
