"""Every kind of dirty data, and the table of them for people.

python tests/dirty/dirty_table.py    # writes KINDS.md beside this file
"""

from __future__ import annotations

from pathlib import Path

import dirty_captions
import dirty_folders
import dirty_links
import dirty_parquet
import dirty_pictures
import dirty_tars
from dirty_kind import Kind

KINDS: list[Kind] = [
    *dirty_tars.KINDS, *dirty_captions.KINDS, *dirty_pictures.KINDS, *dirty_parquet.KINDS, *dirty_links.KINDS,
    *dirty_folders.KINDS,
]  # fmt: skip
SHARDS = [kind for kind in KINDS if kind.group in ("tar", "caption", "picture", "Parquet", "URI list")]
TABLE = Path(__file__).with_name("KINDS.md")

_HEAD = """# Dirty data: what comes in, and how it ends

Made by `python tests/dirty/dirty_table.py` from the kinds that the tests of this folder write, read and compare one by one:
{count} of them. Beside the odd sample of a shard lie healthy ones, and they are always kept unless the table says otherwise.

- **kept**: the sample is embedded, trained on, and counted; pictures give exactly the pixels of open_clip's transform of the
  file, unless the table says whose.
- **rejected**: the row is counted and listed under `rejects/` with its shard, its key and this reason; rows in = rows out +
  rejects. What each reason means is in `REJECT_REASONS` (cir_core/shards/model.py) and `IMAGE_ERROR_REASONS`
  (cir_core/preprocessing.py). What lies behind a damaged place in a tar cannot be read, and its rows cannot be counted.
- **error**: a CirError that names the file and holds this text: nothing of it is used.
"""


def markdown() -> str:
    """Return the table as Markdown."""
    lines = [_HEAD.format(count=len(KINDS))]
    for group in dict.fromkeys(kind.group for kind in KINDS):
        lines += [f"## {group[0].upper()}{group[1:]}\n", "| kind | what it is | how it ends |", "|---|---|---|"]
        lines += [
            f"| {kind.name} | {_cell(kind.what)} | {_cell(_ending(kind))} |" for kind in KINDS if kind.group == group
        ]
        lines.append("")
    return "\n".join(lines)


def _ending(kind: Kind) -> str:
    if kind.error:
        end = f"error: {kind.error}"
    elif kind.rejects:
        end = "; ".join(f"{_name(kind, key)} rejected: {reason}" for key, reason in kind.rejects)
    else:
        end = "kept" if kind.kept else "kept: nothing is there"
    return f"{end}; {kind.note}" if kind.note else end


def _name(kind: Kind, key: str) -> str:
    if not key:
        return "the rest" if kind.group == "tar" else "the row"
    return repr(key)[1:-1]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    TABLE.write_text(markdown(), encoding="utf-8")
