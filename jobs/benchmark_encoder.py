"""How fast both towers are as an encoder runs them, beside open_clip's own calls. Called by jobs/benchmark.py; no Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.benchmark_training import Contest, Measured, compare

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.benchmark import BenchmarkConfig

_CAPTION = "a photo of a small dog with a red ball lying on the grass beside a wooden bench, number {}"


def measure_encoder(config: BenchmarkConfig) -> Measured:
    """Images and captions through the encoder in bfloat16, and in float32 and open_clip's calls in both, in turns."""
    import torch
    import torch.nn.functional as F

    from cir_core.lora import last_block_for_class_token
    from jobs.benchmark import in_turns, load_model

    plain, full, low = (load_model(config, precision) for precision in ("fp32", "fp32", "bf16"))
    for encoder in (full, low):
        last_block_for_class_token(encoder.model.visual)  # as embed.py does
    torch.manual_seed(0)
    size = plain.preprocessing.size
    images = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    captions = [_CAPTION.format(number) for number in range(config.batch_size)]

    def open_clip_images() -> Tensor:
        return F.normalize(plain.model.encode_image(plain.normalize(images)), dim=-1)

    def open_clip_captions() -> Tensor:
        return F.normalize(plain.model.encode_text(plain.tokenize(captions).to(plain.device)), dim=-1)

    def turn(call: Callable[[], Tensor], bf16: bool = False) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), torch.autocast(plain.device.type, dtype=torch.bfloat16, enabled=bf16):
                for _ in range(config.steps_per_round):
                    call().cpu()  # waits for a GPU

        return run

    tables: list[str] = []
    metrics: dict[str, float] = {}
    for title, first, own, rival in (
        ("Encoder images", lambda: low.encode_images(images), lambda: full.encode_images(images), open_clip_images),
        (
            "Encoder captions",
            lambda: low.encode_texts(captions),
            lambda: full.encode_texts(captions),
            open_clip_captions,
        ),
    ):
        contests = [
            Contest(
                key,
                name,
                *in_turns(turn(first), side, rounds=config.rounds, samples=config.steps_per_round * config.batch_size),
            )
            for key, name, side in (
                ("fp32", "ours, fp32", turn(own)),
                ("open_clip_fp32", "open_clip, fp32", turn(rival)),
                ("open_clip_bf16", "open_clip, bf16 autocast", turn(rival, bf16=True)),
            )
        ]
        notes = f"{config.model}, batch {config.batch_size}, {torch.get_num_threads()} threads; pictures and captions in memory."
        measured = compare(title, notes, "ours, bf16", contests)
        tables.append(measured.markdown)
        metrics |= measured.metrics
    return Measured("\n".join(tables), metrics)
