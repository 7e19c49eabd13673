"""Look at a store, or check it, without a cluster.

    python -m cir_core.embedding_store info s3://bucket/store      # what it holds, from its manifest
    python -m cir_core.embedding_store verify s3://bucket/store    # read everything: checksums, counts, strangers

Exit codes: 0 sound, 1 `verify` found something, 2 not a store, or a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from cir_core import files
from cir_core.embedding_store.read import EmbeddingStore
from cir_core.schema import CirError


def info(store: EmbeddingStore) -> list[tuple[str, str]]:
    """Return what a store says of itself, as names and values; reads the manifest, and rejects if there are any."""
    manifest = store.manifest
    sizes = sum(part.size_bytes for part in store.parts)
    rows: list[tuple[str, str]] = [("store", files.redact(store.uri)), ("identity", store.identity)]
    rows += [(name, str(value)) for name, value in asdict(manifest.spec).items()]
    rows += [
        ("columns", ", ".join(("id", "embedding", *manifest.columns))),
        ("rows", str(manifest.num_rows)),
        ("rejects", str(manifest.num_rejects)),
        ("parts", f"{len(store.parts)}, {sizes / 1e6:.1f} MB"),
    ]
    with_rejects = [part.index for part in store.parts if part.num_rejects]
    reasons = Counter(reject.reason for found in store.read_rejects(with_rejects) for reject in found)
    return rows + [(f"rejects: {reason}", str(count)) for reason, count in reasons.most_common()]


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cir_core.embedding_store", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what the store holds").add_argument("uri")
    verify = commands.add_parser("verify", help="check every checksum and count")
    verify.add_argument("uri")
    verify.add_argument("--threads", type=int, default=8, help="files read at once")
    given = parser.parse_args(arguments)
    try:
        with files.patience(20):
            store = EmbeddingStore.open(given.uri)
        if given.command == "info":
            print("\n".join(f"{name:20} {value}" for name, value in info(store)))
            return 0
        problems = store.verify(threads=max(1, given.threads))
    except (CirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    counted = f"{len(store.parts)} parts, {store.num_rows} rows, {store.manifest.num_rejects} rejects"
    print(f"{len(problems)} problems in {counted}" if problems else f"sound: {counted}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
