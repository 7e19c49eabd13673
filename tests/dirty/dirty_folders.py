"""Kinds of picture folders and of what is given as shards: links, names, permissions, holes and typing mistakes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dirty_kind import Kind, jpeg, sample, tar_bytes


def _folder(
    name: str,
    what: str,
    build: Callable[[Path], object],
    *,
    kept: tuple[str, ...] = ("a.jpg",),
    rejects: tuple[tuple[str, str], ...] = (),
    **more: object,
) -> Kind:
    """A folder with the picture a.jpg and what `build` adds."""

    def write(folder: Path) -> str:
        inside = folder / name
        inside.mkdir()
        if "a.jpg" in kept:
            (inside / "a.jpg").write_bytes(jpeg())
        build(inside)
        return str(inside)

    return Kind(name, "folder", what, write, () if more.get("error") else kept, rejects, **more)


def _pictures(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(jpeg())

    return build


def _files(contents: dict[str, bytes]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name, data in contents.items():
            (folder / name).write_bytes(data)

    return build


def _linked_folder(folder: Path) -> None:
    other = folder.parent / "elsewhere"
    other.mkdir()
    (other / "b.jpg").write_bytes(jpeg())
    (folder / "sub").symlink_to(other)


def _circle(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")


def _latin_1(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(jpeg())


def _locked(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is locked to root")
    (folder / "b.jpg").write_bytes(jpeg())
    (folder / "b.jpg").chmod(0)


def _large(folder: Path) -> None:
    with (folder / "b.jpg").open("wb") as sink:
        sink.truncate(65 << 20)


NO_IMAGE = "no image in this folder"
_NAMES = ("a b.jpg", "a\nb.jpg", "a%2Fb.jpg", "a?b=c.jpg", "a#b.jpg", "a\\b.jpg", "a'b\".jpg", "[a]*.jpg")

FOLDERS = [
    _folder("folder-empty", "an empty folder", lambda _: None, kept=(), error=NO_IMAGE),
    _folder("folder-without-images", "a folder of texts", _files({"README.md": b"x", "a.txt": b"a"}), kept=(), error=NO_IMAGE),
    Kind("folder-missing", "folder", "a folder that does not exist", lambda folder: str(folder / "nowhere"), error="no such file"),
    _folder("folder-zero-bytes", "a picture of zero bytes", _files({"b.jpg": b""}), rejects=(("b.jpg", "empty_image"),)),
    _folder("folder-html", "an error page named .jpg", _files({"b.jpg": b"<html>404</html>"}), rejects=(("b.jpg", "unreadable"),)),
    _folder("folder-65-mib", "a picture of 65 MiB", _large, rejects=(("b.jpg", "sample_too_large"),)),
    _folder("folder-broken-caption", "a caption that is not UTF-8", lambda f: (_pictures("b.jpg")(f), _files({"b.txt": b"\xff"})(f)),
            rejects=(("b.jpg", "bad_caption_encoding"),)),
    _folder("folder-two-of-one-stem", "a.jpg and a.png", _pictures("a.png"), kept=("a.jpg", "a.png"), note="the suffix is part of the key"),
    _folder("folder-part-files", "downloads that did not end, b.jpg.part", _files({"b.jpg.part": b"x"}), note="no row: the suffix is no picture's"),
    _folder("folder-upper-case", "a picture named B.JPG", _pictures("B.JPG"), kept=("B.JPG", "a.jpg")),
    _folder("folder-hidden", "a hidden picture, .b.jpg", _pictures(".b.jpg"), kept=(".b.jpg", "a.jpg")),
    _folder("folder-apple-double", "the ._a.jpg that macOS writes beside a.jpg", _files({"._a.jpg": b"\0\5\x16\7"}), note="no row: it holds attributes"),
    _folder("folder-named-jpg", "a folder named x.jpg with a picture in it", _pictures("x.jpg/b.jpg"), kept=("a.jpg", "x.jpg/b.jpg")),
    _folder("folder-odd-names", "spaces, newlines, quotes, and what means something in URIs and globs", _pictures(*_NAMES),
            kept=tuple(sorted((*_NAMES, "a.jpg")))),
    _folder("folder-unicode-forms", "one name in two forms of Unicode", _pictures("\u00e9.jpg", "e\u0301.jpg"),
            kept=("a.jpg", "e\u0301.jpg", "\u00e9.jpg"), note="two names, as the file system has it"),
    _folder("folder-latin-1-name", "a name that is not UTF-8", _latin_1, error="the name is not UTF-8"),
    _folder("folder-link-to-file", "a link to a picture", lambda f: (f / "b.jpg").symlink_to("a.jpg"), kept=("a.jpg", "b.jpg")),
    _folder("folder-link-to-folder", "a link to another folder", _linked_folder, kept=("a.jpg", "sub/b.jpg")),
    _folder("folder-link-to-nowhere", "a link whose picture is gone", lambda f: (f / "b.jpg").symlink_to("gone"), rejects=(("b.jpg", "not_a_file"),)),
    _folder("folder-link-to-itself", "a link to itself", lambda f: (f / "b.jpg").symlink_to("b.jpg"), rejects=(("b.jpg", "not_a_file"),)),
    _folder("folder-circle", "a link to the folder above it", _circle, error="a link to a folder above it"),
    _folder("folder-pipe", "a named pipe called b.jpg, which nobody ever fills", lambda f: os.mkfifo(f / "b.jpg"),
            rejects=(("b.jpg", "not_a_file"),)),
    _folder("folder-locked-file", "a picture that may not be read", _locked, rejects=(("b.jpg", "missing"),)),
]  # fmt: skip


def _given(name: str, what: str, given: Callable[[Path], str | list[str]], **more) -> Kind:
    """What a user gives as shards, in a folder of 0.tar, 1.tar and 3.tar."""

    def write(folder: Path) -> str | list[str]:
        inside = folder / name
        inside.mkdir()
        for number in (0, 1, 3):
            (inside / f"{number}.tar").write_bytes(tar_bytes(sample(name, str(number))))
        return given(inside)

    return Kind(name, "list", what, write, **more)


def _with_link(folder: Path) -> str:
    (folder / "2.tar").symlink_to("gone.tar")
    return str(folder)


def _with_directory(folder: Path) -> str:
    (folder / "2.tar").mkdir()
    return str(folder / "2.tar")


def _with_latin_1(folder: Path) -> str:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xe9.tar")).write_bytes(b"")
    return str(folder)


LISTS = [
    _given("list-range-with-a-hole", "{0..3}.tar without 2.tar", lambda f: f"{f}/{{0..3}}.tar", error="1 of 4 shards are missing"),
    _given("list-range-backwards", "{3..0}.tar", lambda f: f"{f}/{{3..0}}.tar", error="is empty or too long"),
    _given("list-range-without-end", "a range of 10^12 shards", lambda f: f"{f}/{{0..999999999999}}.tar", error="is empty or too long"),
    _given("list-missing-shard", "a shard that does not exist", lambda f: f"{f}/7.tar", error="no such file"),
    _given("list-empty-glob", "a glob that matches nothing", lambda f: f"{f}/x*.tar", error="file matches"),
    _given("list-missing-folder", "a folder that does not exist", lambda f: f"{f}/nowhere/", error="expected a folder or a name that ends in"),
    _given("list-empty-prefix", "a prefix of a store with nothing below it", lambda _: "memory://nothing/here/", error="expected a folder"),
    _given("list-other-suffix", "a .tar.gz", lambda f: f"{f}/0.tar.gz", error="expected a folder or a name that ends in"),
    _given("list-nothing", "an empty list", lambda _: [], error="no shards given"),
    _given("list-empty-name", "an empty name", lambda _: "", error="is not a path"),
    _given("list-unknown-scheme", "a URI that nothing opens", lambda _: "gopher://host/0.tar", error="cannot open this kind of URI"),
    _given("list-link-to-nowhere", "a shard that is a link, and its target is gone", _with_link, error="leads nowhere"),
    _given("list-directory-named-tar", "a folder named 2.tar", _with_directory, error="no *.tar or *.parquet file in this folder"),
    _given("list-latin-1-name", "a shard whose name is not UTF-8", _with_latin_1, error="the name is not UTF-8"),
    _given("list-shard-twice", "a shard given twice", lambda f: [f"{f}/1.tar", f"{f}/*.tar"], kept=("1.tar", "0.tar", "3.tar"),
           note="read once, where it comes first"),
]  # fmt: skip


def _vectors(name: str, what: str, value: float, **more) -> Kind:
    """Three unit vectors; the first number of the second is `value`."""

    def write(folder: Path) -> str:
        vectors = np.eye(3, 8, dtype=np.float32)
        vectors[1, 1] = value
        np.save(folder / f"{name}.npy", vectors)
        return str(folder / f"{name}.npy")

    return Kind(name, "embedding", what, write, error="1 of 3 rows are not finite unit vectors", **more)


EMBEDDINGS = [
    _vectors("embedding-nan", "NaN from a model, for one picture", float("nan"), note="nothing is written"),
    _vectors("embedding-infinite", "infinity from a model, for one picture", float("inf"), note="nothing is written"),
    _vectors("embedding-zero", "a vector of zeros, which has no direction", 0.0, note="nothing is written"),
    _vectors("embedding-not-normalised", "a vector of length 2", 2.0, note="nothing is written"),
]  # fmt: skip

KINDS = FOLDERS + LISTS + EMBEDDINGS
