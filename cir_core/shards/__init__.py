"""Image-text shards: WebDataset tar (the img2dataset layout), Parquet, folders of images: read and write.

A shard is the unit of work. `index_shard` counts its samples and cuts it into slices that can be read
alone, which is what lets a training job shuffle globally and resume exactly; `read_slice` and `read_shard`
give the very samples that were counted. A row that cannot be used is a `Reject` with one of
`REJECT_REASONS`: rows in = samples + rejects.
"""

from cir_core.shards.images import index_image_folder, list_images
from cir_core.shards.index import find_images, index_shard, read_captions, read_shard, read_slice
from cir_core.shards.listing import list_shards, shard_versions
from cir_core.shards.model import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    REJECT_REASONS,
    Sample,
    ShardIndex,
    Slice,
)
from cir_core.shards.write import write_parquet_shard, write_tar_shard

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_SAMPLE_BYTES",
    "REJECT_REASONS",
    "Sample",
    "ShardIndex",
    "Slice",
    "find_images",
    "index_image_folder",
    "index_shard",
    "list_images",
    "list_shards",
    "read_captions",
    "read_shard",
    "read_slice",
    "shard_versions",
    "write_parquet_shard",
    "write_tar_shard",
]
