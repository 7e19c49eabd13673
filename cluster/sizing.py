"""What 1 M, 100 M and 1 B images take: GPU-hours, cores, memory, storage, parts, requests, money; Markdown out.

    python cluster/sizing.py                                    # the tables of cluster/README.md
    python cluster/sizing.py --models '[ViT-B-32]' --gpu_tflops 121 --images '[10000000]' --hours 8 --gpu_hour 0.8

Every figure comes from the settings below by the formula in its row. Of the settings some are measured (where: see each
one's help), the others are arithmetic, assumptions or example prices: put yours in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from jsonargparse import ArgumentParser

MODELS = {  # GFLOP of the image tower and of the text tower for one input, numbers of an embedding: open_clip's profile
    "ViT-B-32": (8.8, 6.0, 512),
    "ViT-L-14": (162.0, 13.3, 768),
}
_FAN_IN = 8  # lists that one task of the search merges: jobs/gallery_search.py
_LIST_BYTES = 12  # a place of a list: an index of 8 bytes, a score of 4


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What the sizes follow from.

    Args:
        model: ViT-B-32 or ViT-L-14.
        images: images of the catalogue, and pairs of one epoch of training; a column each.
        queries: queries that are answered.
        k: images of an answer.
        hours: time in which each job shall be done.
        gpu_tflops: peak of a GPU in bf16. Data sheet: 121 is an L4, 312 an A100, 989 an H200.
        gpu_share: part of the peak that is reached. Assumed.
        decode: images a core decodes in a second. Measured: JPEG photographs to 224 pixels, PIL, one core of an AMD EPYC.
        read: rows a core reads from tars in a second. Measured: our reader, the same machine.
        search_gflops: GFLOP/s of a core in exact search. Measured: 256 queries, 400,000 x 512, k = 50, prepared gallery,
            0.184 s on two cores (jobs/BENCHMARKS.md): 2 * 256 * 400,000 * 512 / 0.184 / 2.
        tile: queries of a pass. The default of --queries_per_part.
        share_gb: memory for a share of the gallery. `--search_memory_gb` of overlays/prod.
        decode_cores: cores of a decode pod, which holds one share. overlays/prod.
        image_kb: size of an image. Assumed: ImageNet's mean.
        shard_images: images of a shard, so of a part. img2dataset's default.
        manifest_bytes: of a part in manifest.json. Measured: 100,000 parts, 33.8 MB.
        manifest_us: microseconds to open the manifest, for each part. Measured: 100,000 parts, 0.78 s, one core.
        gpu_hour: price of a GPU for an hour, with its cores and memory. Example.
        core_hour: price of a core with 3 GB for an hour. Example.
        gb_month: price of a GB for a month. Example: AWS S3, standard.
        puts: price of 1000 PUT or LIST requests. Example: the same.
        gets: price of 1000 GET requests. Example: the same.
    """

    model: str = "ViT-L-14"
    images: tuple[int, ...] = (1_000_000, 100_000_000, 1_000_000_000)
    queries: int = 1_000_000
    k: int = 50
    hours: float = 24.0
    gpu_tflops: float = 312.0
    gpu_share: float = 0.4
    decode: float = 630.0
    read: float = 5400.0
    search_gflops: float = 285
    tile: int = 4096
    share_gb: float = 24.0
    decode_cores: int = 16
    image_kb: float = 110.0
    shard_images: int = 10_000
    manifest_bytes: int = 338
    manifest_us: float = 7.8
    gpu_hour: float = 2.5
    core_hour: float = 0.05
    gb_month: float = 0.023
    puts: float = 0.005
    gets: float = 0.0004

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, not {self.model!r}")
        wrong = [
            field.name
            for field in fields(self)
            if field.name != "model"
            and any(value <= 0 for value in (self.images if field.name == "images" else (getattr(self, field.name),)))
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be above 0")
        if not self.images:
            raise ValueError("images: names no size of a catalogue, expected at least one")
        if self.gpu_share > 1:
            raise ValueError(f"gpu_share: must be a share, above 0 and at most 1, not {self.gpu_share}")

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return MODELS[self.model][2]


def encode_rate(sizing: Sizing) -> float:
    """Return images/s of a GPU that only encodes."""
    return sizing.gpu_tflops * 1e12 * sizing.gpu_share / (MODELS[sizing.model][0] * 1e9)


def train_rate(sizing: Sizing) -> float:
    """Return pairs/s of a GPU: the image tower forward and, its weights frozen, once more backward; the text tower forward."""
    image, text, _ = MODELS[sizing.model]
    return sizing.gpu_tflops * 1e12 * sizing.gpu_share / ((2 * image + text) * 1e9)


def train(sizing: Sizing, num_images: int) -> dict[str, float]:
    """Return what one epoch over `num_images` pairs takes."""
    gpu_hours = num_images / train_rate(sizing) / 3600
    gpus = math.ceil(gpu_hours / sizing.hours)
    return {
        "steps": num_images / 1024,
        "gpu_hours": gpu_hours,
        "gpus": gpus,
        "decode_cores": gpus * train_rate(sizing) * (1 / sizing.decode + 1 / sizing.read),
        "cost": gpu_hours * sizing.gpu_hour,
    }


def embed(sizing: Sizing, num_images: int) -> dict[str, float]:
    """Return what embedding takes, with `decode_cores` beside the GPUs, and what the store is."""
    gpu_hours = num_images / encode_rate(sizing) / 3600
    core_hours = num_images * (1 / sizing.decode + 1 / sizing.read) / 3600
    parts = math.ceil(num_images / sizing.shard_images)
    images_gb = num_images * sizing.image_kb / 1e6
    store_gb = num_images * (2 * sizing.dim + 20) / 1e9
    # part, rejects and marker; markers are read at the end, a shard in one request or more of 8 MB
    requests = 3 * parts * sizing.puts / 1000 + (parts + images_gb * 1000 / 8) * sizing.gets / 1000
    return {
        "gpu_hours": gpu_hours,
        "gpus": math.ceil(gpu_hours / sizing.hours),
        "core_hours": core_hours,
        "decode_cores": core_hours / sizing.hours,
        "images_gb": images_gb,
        "store_gb": store_gb,
        "parts": parts,
        "manifest_mb": parts * sizing.manifest_bytes / 1e6,
        "manifest_s": parts * sizing.manifest_us / 1e6,
        "listings": math.ceil(parts / 1000),
        "cost": gpu_hours * sizing.gpu_hour + core_hours * sizing.core_hour + requests,
        "cost_month": (images_gb + store_gb) * sizing.gb_month,
    }


def search(sizing: Sizing, num_images: int) -> dict[str, float]:
    """Return what answering the queries takes, exactly, on CPUs, every share held in memory."""
    held_gb = num_images * sizing.dim * 4 / 1e9  # float16 as stored and bfloat16 as scanned
    shares = math.ceil(held_gb / sizing.share_gb)
    core_hours = 2 * sizing.dim * num_images * sizing.queries / (sizing.search_gflops * 1e9) / 3600
    lists, merged = shares, 0
    while lists > 1:
        merged, lists = merged + lists, math.ceil(lists / _FAN_IN)
    pods = max(shares, math.ceil(core_hours / sizing.hours / sizing.decode_cores))
    return {
        "held_gb": held_gb,
        "shares": shares,
        "core_hours": core_hours,
        "pods": pods,
        "hours": core_hours / (pods * sizing.decode_cores),
        "tiles": math.ceil(sizing.queries / sizing.tile),
        "tiles_gb": sizing.queries * 2 * sizing.dim * 4 * shares / 1e9,
        "merge_gb": sizing.queries * sizing.k * _LIST_BYTES * merged / 1e9,
        "streamed_tb": num_images * (2 * sizing.dim + 20) / 1e12 * math.ceil(sizing.queries / sizing.tile),
        "cost": core_hours * sizing.core_hour,
    }


Row = tuple[str, Callable[[Sizing, int], dict[str, float]], str, str]
ROWS: tuple[Row, ...] = (
    ("train: steps of 1024 pairs, one epoch", train, "steps", "images / 1024"),
    ("train: GPU-hours", train, "gpu_hours", "images x (2 image + text GFLOP) / (peak x share)"),
    ("train: GPUs", train, "gpus", "GPU-hours / hours"),
    ("train: cores that decode for them", train, "decode_cores", "pairs/s x (1 / decode + 1 / read)"),
    ("train: cost", train, "cost", "GPU-hours x price"),
    ("embed: GPU-hours", embed, "gpu_hours", "images x GFLOP / (peak x share)"),
    ("embed: GPUs", embed, "gpus", "GPU-hours / hours"),
    ("embed: core-hours", embed, "core_hours", "images x (1 / decode + 1 / read)"),
    ("embed: cores", embed, "decode_cores", "core-hours / hours"),
    ("embed: cost", embed, "cost", "GPU-hours, core-hours, requests x prices"),
    ("images, GB", embed, "images_gb", "images x size"),
    ("store, GB", embed, "store_gb", "images x (2 bytes x dim + 20 of id), float16"),
    ("cost of a month's storage", embed, "cost_month", "both x price"),
    ("parts", embed, "parts", "images / images of a shard"),
    ("manifest, MB", embed, "manifest_mb", "parts x bytes"),
    ("manifest, seconds to open", embed, "manifest_s", "parts x time"),
    ("LIST requests of the shards", embed, "listings", "parts / 1000"),
    ("search: gallery in memory, GB", search, "held_gb", "images x dim x 4 bytes"),
    ("search: shares (--num_shards)", search, "shares", "GB / GB of a share, rounded up"),
    ("search: core-hours", search, "core_hours", "2 x dim x images x queries / GFLOP/s"),
    ("search: decode pods", search, "pods", "enough for the shares and for the hours"),
    ("search: hours with these", search, "hours", "core-hours / cores"),
    ("search: tiles", search, "tiles", "queries / queries of a tile"),
    ("search: tiles to shares, GB", search, "tiles_gb", "queries x dim x 8 bytes x shares"),
    ("search: lists to merge, GB", search, "merge_gb", "queries x k x 12 bytes x lists, all levels of 8"),
    ("search: read if nothing is held, TB", search, "streamed_tb", "store x tiles"),
    ("search: cost", search, "cost", "core-hours x price"),
)


def table(sizing: Sizing) -> str:
    """Return the sizes as Markdown, a column for each number of images."""
    gpu = f"{sizing.gpu_tflops:g} TFLOP/s x {sizing.gpu_share:g}"
    lines = [
        f"{sizing.model} ({MODELS[sizing.model][0]:g} GFLOP an image, dim {sizing.dim}), GPUs of {gpu}, "
        f"{named(sizing.queries)} queries, k = {sizing.k}, each job in {sizing.hours:g} hours:",
        "",
        f"| | {' | '.join(map(named, sizing.images))} | how |",
        "|---|" + "---|" * (len(sizing.images) + 1),
    ]
    for label, job, key, formula in ROWS:
        values = [shown(job(sizing, number)[key]) for number in sizing.images]
        lines.append(f"| {label} | {' | '.join(values)} | {formula} |")
    return "\n".join(lines)


def named(number: int) -> str:
    """Return 100000000 as '100 M'."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:g} {name}"
    return str(number)


def shown(value: float) -> str:
    """Return a size with two digits that count, whole from 10 on."""
    if value == 0 or value == int(value) or value >= 99.5:
        return f"{round(value):,}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def report(sizing: Sizing, models: Sequence[str]) -> str:
    """Return a table for each model."""
    return "\n\n".join(table(replace(sizing, model=model)) for model in models)


def main() -> None:
    """Print the tables; exit code 2 for a setting that is wrong."""
    parser = ArgumentParser(prog="sizing.py", description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=list[str], default=list(MODELS), help="A table for each of these.")
    parser.add_class_arguments(Sizing, as_group=False, skip={"model"})
    settings = parser.parse_args().as_dict()
    models = settings.pop("models")
    try:
        print(report(Sizing(**settings), models))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
