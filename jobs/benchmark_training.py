"""How fast a training step is beside the alternatives', and what saving memory costs. Called by jobs/benchmark.py; no Ray."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder
    from cir_core.tuning import TextAnchoredTuner, TuningSettings
    from jobs.benchmark import BenchmarkConfig, Turns
    from jobs.benchmark_rivals import Batch


@dataclass(frozen=True)
class Measured:
    """A table for people, and its medians and ratios as numbers for a tracker."""

    markdown: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Contest:
    """One rival, measured in turns with the same first side. key: its name in metrics; cells: of further columns."""

    key: str
    name: str
    first: Turns
    rival: Turns
    cells: tuple[str, ...] = ()


def ratios(first: Sequence[float], rival: Sequence[float]) -> list[float]:
    """Return first / rival of every round, smallest first."""
    return sorted(one / other for one, other in zip(first, rival, strict=True))


def compare(
    title: str,
    notes: str,
    first: str,
    contests: Sequence[Contest],
    *,
    columns: Sequence[str] = (),
    cells: Sequence[str] = (),
) -> Measured:
    """Make the table and the metrics of a first side beside its rivals; cells: the first side's in the further columns.

    A ratio is first / rival: the median of the rounds' ratios, with their range.
    """
    key = title.lower().replace(" ", "_")
    rounds, metrics = len(contests[0].first.per_second), {}
    head = f"| median of {rounds} rounds | samples/s | {first} / this | samples per CPU-second | {first} / this |"
    own = contests[0].first
    rows = [_row(first, own, [], cells)]
    metrics[f"{key}/first_samples_per_second"] = statistics.median(own.per_second)
    for contest in contests:
        pairs = [(contest.first.per_second, contest.rival.per_second)]
        pairs.append((contest.first.per_cpu_second, contest.rival.per_cpu_second))
        found = [ratios(*pair) for pair in pairs]
        rows.append(_row(contest.name, contest.rival, found, contest.cells))
        metrics[f"{key}/{contest.key}_samples_per_second"] = statistics.median(contest.rival.per_second)
        metrics[f"{key}/first_over_{contest.key}"] = statistics.median(found[0])
        metrics[f"{key}/first_over_{contest.key}_cpu"] = statistics.median(found[1])
    table = [head + "".join(f" {name} |" for name in columns), "|---" * (5 + len(columns)) + "|", *rows]
    return Measured("\n".join([f"### {title}", "", notes, "", *table, ""]), metrics)


def _row(name: str, turns: Turns, found: Sequence[list[float]], cells: Sequence[str]) -> str:
    shown = [f"{statistics.median(one):.2f} [{one[0]:.2f}, {one[-1]:.2f}]" for one in found] or ["1", "1"]
    rates = [f"{statistics.median(rate):.2f}" for rate in (turns.per_second, turns.per_cpu_second)]
    return f"| {' | '.join([name, rates[0], shown[0], rates[1], shown[1], *cells])} |"


@dataclass(frozen=True)
class Setting:
    """What all sides of a measurement share."""

    config: BenchmarkConfig
    encoder: OpenClipEncoder
    settings: TuningSettings
    batch: Batch

    @property
    def about(self) -> str:
        """Say what is measured, for a table's notes."""
        import torch

        threads = torch.get_num_threads()
        weights = self.config.pretrained or ("its own" if self.config.model == "scenes-tiny" else "random")
        return (
            f"Training step of {self.config.model} ({weights} weights), batch {self.config.batch_size}, "
            f"{self.settings.precision}, {threads} thread{'s' * (threads > 1)}, images in memory"
        )

    def contest(self, key: str, name: str, first: Callable[[], None], rival: Callable[[], None]) -> Contest:
        """Measure two turns against each other."""
        from jobs.benchmark import in_turns

        samples = self.config.steps_per_round * self.config.batch_size
        return Contest(key, name, *in_turns(first, rival, rounds=self.config.rounds, samples=samples))

    def turn(self, step: Callable[[int], object]) -> Callable[[], None]:
        """Return a turn of steps_per_round steps."""

        def steps() -> None:
            for number in range(self.config.steps_per_round):
                step(number)
            self.wait()

        return steps

    def ours(self, tuner: TextAnchoredTuner, *, captions: bool = False) -> Callable[[], None]:
        """Return a turn of a tuner's steps, from captions or from ready anchors."""
        texts = self.batch.captions if captions else self.batch.anchors
        return self.turn(lambda number: tuner.step(number, self.batch.images, texts, self.batch.valid))

    def wait(self) -> None:
        """Wait for the GPU, if that is measured."""
        if self.config.use_gpu:
            import torch

            torch.cuda.synchronize()


def set_up(config: BenchmarkConfig) -> Setting:
    """Load the model and make the batch."""
    from cir_core.tuning import TuningSettings
    from jobs.benchmark import load_model
    from jobs.benchmark_rivals import make_batch

    encoder = load_model(config)
    settings = TuningSettings(total_steps=1_000_000, precision=encoder.details.precision)
    return Setting(config, encoder, settings, make_batch(encoder, config.batch_size))


def measure_training_peft(config: BenchmarkConfig) -> Measured:
    """Our step against PEFT's LoRA of nn.MultiheadAttention, in a plain loop and in our step; ready anchors."""
    from cir_core.tuning import TextAnchoredTuner
    from jobs.benchmark_rivals import R, make_tuner, peft_encoder

    setting = set_up(config)
    ours = setting.ours(make_tuner(setting.encoder, setting.settings))
    plain, drift = _plain_peft(setting, ours)
    inside = setting.ours(TextAnchoredTuner(peft_encoder(setting.encoder), setting.settings))
    contests = [plain, setting.contest("peft_in_our_step", "PEFT's LoRA in our step", ours, inside)]
    notes = (
        f"{setting.about}, LoRA r {R}, ready anchors. Equal rank is not equal targets: PEFT's path adapts all of in_proj and "
        "out_proj, ours q_proj and v_proj; and it leaves out lora_dropout. It adds the update to the frozen weights before "
        f"every forward pass and subtracts it after: they ended up to {drift:.1e} of the largest away from where they began."
    )
    measured = compare("Training PEFT", notes, "ours", contests)
    return replace(measured, metrics={**measured.metrics, "training_peft/frozen_weights_drift": drift})


def _plain_peft(setting: Setting, ours: Callable[[], None]) -> tuple[Contest, float]:
    """Measure PEFT's layers in a plain loop, and how far its frozen weights moved, relative to the largest."""
    from jobs.benchmark_rivals import PlainStep, attention_weights, peft_encoder

    plain = PlainStep(peft_encoder(setting.encoder), setting.settings)
    before = attention_weights(plain.encoder)
    turn = setting.turn(lambda _: plain.step(setting.batch.images, setting.batch.anchors))
    contest = setting.contest("peft", "PEFT's LoRA, plain loop", ours, turn)
    pairs = zip(before, attention_weights(plain.encoder), strict=True)
    return contest, max(float((new - old).abs().max() / old.abs().max()) for old, new in pairs)


def measure_training_open_clip(config: BenchmarkConfig) -> Measured:
    """Our step from captions against open_clip's trainer, text tower locked: image tower unlocked, and with PEFT's LoRA."""
    from jobs.benchmark_rivals import R, make_tuner, open_clip_epoch

    setting = set_up(config)
    ours = setting.ours(make_tuner(setting.encoder, setting.settings), captions=True)
    contests = []
    for key, name, adapted in (
        ("open_clip_unlocked", "open_clip_train, image tower unlocked", False),
        ("open_clip_lora", "open_clip_train, PEFT's LoRA on the image tower", True),
    ):
        epoch = open_clip_epoch(
            setting.encoder, setting.settings, setting.batch, steps=config.steps_per_round, adapted=adapted
        )

        def turn(epoch: Callable[[], None] = epoch) -> None:
            epoch()
            setting.wait()

        contests.append(setting.contest(key, name, ours, turn))
    notes = (
        f"{setting.about}; ours: LoRA r {R} on q_proj and v_proj. The text tower is locked, and runs in every step on all "
        "sides. open_clip_train's train_one_epoch is given normalised images and tokens, ours bytes and captions. Unlocked, "
        "it trains every weight of the image tower: more work, for another result."
    )
    return compare("Training open_clip", notes, "ours", contests)


def kept_bytes(tuner: TextAnchoredTuner, batch: Batch) -> int:
    """Return the bytes that the backward passes of one step keep at once; what checkpointing recomputes is not seen."""
    from cir_core.tuning.saved_tensors import SavedTensors

    tuner.tower.train()
    with SavedTensors(tuner.encoder.model.parameters()) as saved:
        tuner.backward(0, batch.images, batch.anchors, batch.valid)
    tuner.optimizer.zero_grad(set_to_none=True)
    tuner.tower.eval()
    return saved.peak_bytes


def measure_training_caching(config: BenchmarkConfig) -> Measured:
    """The whole batch at once against gradient caching, gradient checkpointing and both: time, and bytes kept."""
    from jobs.benchmark_rivals import R, make_tuner

    setting = set_up(config)
    micro = config.micro_batch_size or max(1, config.batch_size // 4)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "caching": (f"gradient caching, micro-batches of {micro}", {"micro_batch_size": micro}),
        "checkpointing": ("gradient checkpointing", {"gradient_checkpointing": True}),
        "both": ("both", {"micro_batch_size": micro, "gradient_checkpointing": True}),
    }
    tuner = make_tuner(setting.encoder, setting.settings)
    kept = {"first": kept_bytes(tuner, setting.batch)}
    whole, contests = setting.ours(tuner), []
    for key, (name, changed) in variants.items():
        other = make_tuner(setting.encoder, replace(setting.settings, **changed))
        kept[key] = kept_bytes(other, setting.batch)
        contest = setting.contest(key, name, whole, setting.ours(other))
        contests.append(replace(contest, cells=(f"{kept[key] / 1e6:.0f}",)))
    notes = (
        f"{setting.about}, LoRA r {R}, ready anchors; the ratio is what a step costs. MB kept for the backward passes at "
        "their peak; with checkpointing, one block's, which is computed again, come on top."
    )
    own = (f"{kept['first'] / 1e6:.0f}",)
    measured = compare("Training caching", notes, "whole batch", contests, columns=["MB kept"], cells=own)
    sizes = {f"training_caching/{key}_kept_bytes": float(size) for key, size in kept.items()}
    return replace(measured, metrics={**measured.metrics, **sizes})
