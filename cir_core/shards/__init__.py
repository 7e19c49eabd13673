"""Image-text shards: WebDataset tar (img2dataset's layout), Parquet, folders of images, lists of URIs: read and write.

A shard is the unit of work. `index_shard` counts its samples and cuts it into slices that can be read
alone, which is what lets a training job shuffle globally and resume exactly; `read_slice` and `read_shard`
give the very samples that were counted. A row that cannot be used is a `Reject` with one of
`REJECT_REASONS`: rows in = samples + rejects. `cut_uri_list` and `read_links` give the rows of a list of URIs
without fetching the images, for work that is too long for one process.
"""

from cir_core.shards.fetch import fetch_image
from cir_core.shards.images import index_image_folder, list_images
from cir_core.shards.index import find_images, index_shard, read_captions, read_shard, read_slice, read_slice_rows
from cir_core.shards.linked import read_list_rows
from cir_core.shards.listing import list_shards, shard_versions
from cir_core.shards.model import (
    IMAGE_SUFFIXES,
    MAX_SAMPLE_BYTES,
    REJECT_REASONS,
    Sample,
    ShardIndex,
    Slice,
)
from cir_core.shards.uri_list import LIST_ROWS, Link, cut_uri_list, is_uri_list, read_links
from cir_core.shards.write import write_parquet_shard, write_tar_shard

__all__ = [
    "IMAGE_SUFFIXES",
    "LIST_ROWS",
    "MAX_SAMPLE_BYTES",
    "REJECT_REASONS",
    "Link",
    "Sample",
    "ShardIndex",
    "Slice",
    "cut_uri_list",
    "fetch_image",
    "find_images",
    "index_image_folder",
    "index_shard",
    "is_uri_list",
    "list_images",
    "list_shards",
    "read_captions",
    "read_links",
    "read_list_rows",
    "read_shard",
    "read_slice",
    "read_slice_rows",
    "shard_versions",
    "write_parquet_shard",
    "write_tar_shard",
]
