"""Kinds of tar files: cut, damaged, misnamed, and members that no shard should hold."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dirty_kind import Kind, Member, file_writer, jpeg, sample, tar_bytes, with_neighbours

_MIB = 1 << 20


def _kind(
    name: str,
    what: str,
    build: Callable[[str], bytes],
    *,
    kept: str | tuple[str, ...] = "a z",
    rejects: tuple[tuple[str, str], ...] = (),
    **more: object,
) -> Kind:
    keys = tuple(kept.split()) if isinstance(kept, str) else kept
    return Kind(name, "tar", what, file_writer(name, ".tar", build), keys, rejects, **more)


def _three(name: str) -> bytes:
    return tar_bytes([*sample(name, "a"), *sample(name, "b"), *sample(name, "z")])


def _place(data: bytes, position: int) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()[position]


def _cut(where: Callable[[bytes], int]) -> Callable[[str], bytes]:
    return lambda name: _three(name)[: where(_three(name))]


def _patched(header: bytes, at: int, value: bytes) -> bytes:
    """Change a header and make its checksum right again."""
    data = bytearray(header)
    data[at : at + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def _sized(member: str, size: int) -> Callable[[str], bytes]:
    """Announce a size, in base 256, that the member `member` of three samples does not have."""

    def build(name: str) -> bytes:
        data = _three(name)
        at = next(i for i in range(6) if _place(data, i).name == f"{name}/{member}")
        offset = _place(data, at).offset
        field = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
        return data[:offset] + _patched(data[offset : offset + 512], 124, field) + data[offset + 512 :]

    return build


def _bad_checksum(position: int) -> Callable[[str], bytes]:
    def build(name: str) -> bytes:
        data = bytearray(_three(name))
        data[_place(bytes(data), position).offset + 150] ^= 0xFF
        return bytes(data)

    return build


def _special(kind: bytes, suffix: str = ".jpg", link: str = "", size: int = 0) -> Callable[[str], bytes]:
    """A member "odd" of another type than a file, with a caption beside it."""

    def build(name: str) -> bytes:
        info = tarfile.TarInfo(f"{name}/odd{suffix}")
        info.type, info.linkname, info.size = kind, link, size
        return with_neighbours(name, (info, b"\0" * size), (f"{name}/odd.txt", b"a caption"))

    return build


def _named(member: str, form: int = tarfile.PAX_FORMAT) -> Callable[[str], bytes]:
    """A sound picture under an odd name; {} stands for the kind's folder."""
    return lambda name: with_neighbours(name, (member.replace("{}", name), jpeg()), form=form)


def _record(key: bytes, value: bytes) -> bytes:
    """Return a pax record, which begins with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return b"%d" % length + rest


def _pax(records: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """A pax header with these records before the picture "odd"."""

    def build(name: str) -> bytes:
        body = records(name)
        header = tarfile.TarInfo("PaxHeader")
        header.type, header.size = tarfile.XHDTYPE, len(body)
        return with_neighbours(name, (header, body), (f"{name}/odd.jpg", jpeg()))

    return build


def _body(*members: Member) -> bytes:
    """Return members as they lie in a tar, without the end marker."""
    data = tar_bytes(members)
    last = _place(data, -1)
    return data[: last.offset_data + last.size + -last.size % 512]


def _sparse_file(member: str, mib: int = 65) -> Callable[[Path], str]:
    """A tar on disk with a large member that takes no room on disk."""

    def write(folder: Path) -> str:
        name = f"tar-{mib}-mib-{member.rpartition('.')[2]}"
        path = folder / f"{name}.tar"
        info = tarfile.TarInfo(f"{name}/{member}")
        info.size = mib * _MIB
        image = [] if member.endswith("jpg") else [(f"{name}/odd.jpg", jpeg())]
        with path.open("wb") as sink:
            sink.write(_body(*sample(name, "a"), *image) + info.tobuf())
            sink.seek(info.size, 1)
            sink.write(tar_bytes(sample(name, "z")))
        return str(path)

    return write


def _zip(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(f"{name}/a.jpg", jpeg())
    return sink.getvalue()


def _sparse(name: str) -> bytes:
    info = tarfile.TarInfo(f"{name}/odd.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = info.tobuf(tarfile.GNU_FORMAT)
    header = _patched(header, 386, b"%011o\0" % 512 + b"%011o\0" % 512)  # one stretch of 512 bytes at 512
    header = _patched(header, 483, b"%011o\0" % 1024)  # the size with its hole
    return _body(*sample(name, "a")) + header + b"x" * 512 + tar_bytes(sample(name, "z"))


def _apple_double(name: str) -> bytes:
    twins = [
        twin
        for member, data in [*sample(name, "a"), *sample(name, "b")]
        for twin in ((f"{name}/._{str(member).rpartition('/')[2]}", b"\0\5\x16\7" + b"\0" * 60), (member, data))
    ]
    return tar_bytes(twins)


def _solaris(name: str) -> bytes:
    body = _record(b"path", f"{name}/odd.jpg".encode())
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.SOLARIS_XHDTYPE, len(body)
    return with_neighbours(name, (header, body), (f"{name}/cut", jpeg()))


def _git_archive(name: str) -> bytes:
    header = tarfile.TarInfo("pax_global_header")
    header.type, header.size = tarfile.XGLTYPE, 52
    return tar_bytes([(header, b"52 comment=" + b"0" * 40 + b"\n"), *sample(name, "a"), *sample(name, "z")])


def _v7(name: str) -> bytes:
    data = bytearray(with_neighbours(name, form=tarfile.USTAR_FORMAT))
    for position in range(4):
        at = _place(bytes(data), position).offset
        data[at : at + 512] = _patched(_patched(bytes(data[at : at + 512]), 257, b"\0" * 8), 156, b"\0")
    return bytes(data)


def _directories(name: str) -> bytes:
    folder = tarfile.TarInfo(f"{name}/odd.jpg")
    folder.type = tarfile.DIRTYPE
    return with_neighbours(name, (folder, b""))


def _huge_extension_header(name: str) -> bytes:
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2 * _MIB
    return with_neighbours(name, (header, b"\0" * 2 * _MIB))


def _frames(name: str) -> bytes:
    return with_neighbours(name, *((f"{name}/film.{number:05}.jpg", b"x") for number in range(3000)))


def _lying_size(difference: int) -> Callable[[str], bytes]:
    return _pax(lambda _: _record(b"size", b"%d" % (len(jpeg()) + difference)))


def _unsafe(key: str) -> tuple[tuple[str, str], ...]:
    return ((key, "unsafe_path"),)


NO_TAR = "not a tar file"
NOT_A_FILE = (("odd", "not_a_file"),)
ODD_KEPT = "a odd z"
_LONG = "folder/" * 30 + "n" * 180

CUT = [
    _kind("tar-cut-in-header", "cut inside the header of the third sample", _cut(lambda d: _place(d, 4).offset + 200),
          kept="a", rejects=(("b", "truncated_tar"),), note="nothing says that b was complete"),
    _kind("tar-cut-in-body", "cut inside the third picture", _cut(lambda d: _place(d, 4).offset_data + 99),
          kept="a b", rejects=(("z", "truncated_tar"),)),
    _kind("tar-cut-in-padding", "cut in the zeros after the last caption", _cut(lambda d: _place(d, 5).offset_data + 99),
          kept="a b", rejects=(("z", "truncated_tar"),)),
    _kind("tar-without-end-marker", "ends after its last member, without the two blocks of zeros",
          _cut(lambda d: _place(d, 5).offset_data + 512), kept="a b", rejects=(("z", "truncated_tar"),)),
    _kind("tar-half-end-marker", "ends with one block of zeros instead of two", _cut(lambda d: _place(d, 5).offset_data + 1024),
          kept="a b z"),
    _kind("tar-of-zero-bytes", "a file of zero bytes", lambda _: b"", kept="", error=NO_TAR),
    _kind("tar-of-100-bytes", "a file shorter than one header", lambda name: _three(name)[:100], kept="", error=NO_TAR),
    _kind("tar-empty-archive", "an archive without members", lambda _: tar_bytes([]), kept="", note="no rows"),
    _kind("tar-all-zeros", "2 MiB of zeros: room was reserved and never written", lambda _: b"\0" * 2 * _MIB, kept="",
          rejects=(("", "trailing_data"),)),
    _kind("tar-zeros-to-the-end", "its second half was never written: zeros where samples should be",
          lambda name: with_neighbours(name) + b"\0" * 2 * _MIB, rejects=(("", "trailing_data"),)),
    _kind("tar-twice", "two tars one after the other", lambda name: with_neighbours(name) + _three(name),
          rejects=(("", "trailing_data"),), note="the second is not read"),
    _kind("tar-bad-checksum", "the header of the third sample is damaged", _bad_checksum(4), kept="a",
          rejects=(("b", "corrupt_tar"),), note="nothing says that b was complete"),
    _kind("tar-first-header-damaged", "the first header is damaged", _bad_checksum(0), kept="", error=NO_TAR),
    _kind("tar-negative-size", "a picture with a negative size", _sized("z.jpg", -512), kept="a",
          rejects=(("b", "corrupt_tar"),)),
    _kind("tar-huge-size", "a picture that announces 2^62 bytes", _sized("z.jpg", 1 << 62), kept="a b",
          rejects=(("z", "truncated_tar"),)),
    _kind("tar-huge-caption-size", "a caption that announces 2^62 bytes", _sized("z.txt", 1 << 62), kept="a b",
          rejects=(("z", "truncated_tar"),)),
    _kind("tar-gzip", "a gzipped tar that is named .tar", lambda name: gzip.compress(_three(name), mtime=0), kept="",
          error="decompress a .tar.gz"),
    _kind("tar-html", "an error page of a web server", lambda _: b"<!DOCTYPE html><title>404</title>" * 40, kept="", error=NO_TAR),
    _kind("tar-zip", "a zip that is named .tar", _zip, kept="", error=NO_TAR),
]  # fmt: skip

MEMBERS = [
    _kind("tar-sparse-gnu", "a picture stored as a sparse file (GNU)", _sparse, kept="a z", rejects=NOT_A_FILE),
    _kind("tar-sparse-pax", "a picture stored as a sparse file (pax)", _pax(lambda _: _record(b"GNU.sparse.major", b"1")), rejects=NOT_A_FILE),
    _kind("tar-symlink", "a picture that is a symbolic link", _special(tarfile.SYMTYPE, link="/etc/passwd"), rejects=NOT_A_FILE),
    _kind("tar-hard-link", "a picture that is a hard link", _special(tarfile.LNKTYPE, link="a.jpg"), rejects=NOT_A_FILE),
    _kind("tar-device", "a picture that is a device", _special(tarfile.CHRTYPE), rejects=NOT_A_FILE),
    _kind("tar-fifo", "a picture that is a named pipe", _special(tarfile.FIFOTYPE), rejects=NOT_A_FILE),
    _kind("tar-directory-named-jpg", "a folder named odd.jpg", _directories, note="folders are no rows"),
    _kind("tar-absolute-path", "a member named /etc/passwd.jpg", _named("/etc/passwd.jpg"), rejects=_unsafe("/etc/passwd")),
    _kind("tar-climbing-path", "a member named ../../evil.jpg", _named("../../evil.jpg"), rejects=_unsafe("../../evil")),
    _kind("tar-climbing-inside", "a member named folder/../../evil.jpg", _named("{}/folder/../../evil.jpg"),
          rejects=_unsafe("folder/../../evil")),
    _kind("tar-nul-in-name", "a zero byte inside a name", _pax(lambda name: _record(b"path", name.encode() + b"/od\0d.jpg")),
          rejects=_unsafe("od\ufffdd")),
    _kind("tar-not-utf8-name", "a name in Latin-1", _named("{}/odd\udce9.jpg", tarfile.GNU_FORMAT), rejects=_unsafe("odd\ufffd")),
    _kind("tar-newline-in-name", "a name with a newline, a quote and a backslash", _named("{}/o\n'd\\d.jpg"), kept=("a", "o\n'd\\d", "z")),
    _kind("tar-long-name-gnu", "a name of 390 characters, GNU's way", _named("{}/" + _LONG + ".jpg", tarfile.GNU_FORMAT),
          kept=f"a {_LONG} z"),
    _kind("tar-long-name-pax", "a name of 390 characters, pax's way", _named("{}/" + _LONG + ".jpg"), kept=f"a {_LONG} z"),
    _kind("tar-pax-size-too-small", "a pax header that announces fewer bytes than there are", _lying_size(-1024), kept="a",
          rejects=(("odd", "corrupt_tar"),)),
    _kind("tar-pax-size-too-large", "a pax header that announces more bytes than there are", _lying_size(1 << 30), kept="a",
          rejects=(("odd", "truncated_tar"),)),
    _kind("tar-pax-record-damaged", "a pax record whose length is a lie", _pax(lambda _: b"999 path=odd.jpg\n"), kept="",
          rejects=(("a", "corrupt_tar"),)),
    _kind("tar-huge-extension-header", "an extension header of 2 MiB", _huge_extension_header, kept="",
          rejects=(("a", "corrupt_tar"),)),
    _kind("tar-global-header", "begins with a global pax header, as git archive writes", _git_archive),
    _kind("tar-solaris-header", "a name in a pax header of Solaris", _solaris, kept=ODD_KEPT),
    _kind("tar-version-7", "a tar from before 1988, without a magic word", _v7),
    _kind("tar-apple-double", "made on macOS: every member has a twin ._name between them", _apple_double, kept="a b",
          note="the twins hold no pictures and are no rows, as in WebDataset"),
    _kind("tar-no-caption", "a picture without caption, and captions are required", _named("{}/odd.jpg"),
          rejects=(("odd", "missing_caption"),), require_caption=True),
    _kind("tar-no-image", "a caption without picture", lambda name: with_neighbours(name, (f"{name}/odd.txt", b"c")),
          rejects=(("odd", "missing_image"),)),
    _kind("tar-readme", "a README between the samples", _named("{}/README"), rejects=(("README", "missing_image"),)),
    _kind("tar-two-images", "a sample with a .jpg and a .png",
          lambda name: with_neighbours(name, (f"{name}/odd.jpg", jpeg()), (f"{name}/odd.png", b"x")), kept=ODD_KEPT,
          note="the first picture is the sample's"),
    _kind("tar-not-neighbours", "the caption of odd comes after another sample",
          lambda name: tar_bytes([(f"{name}/odd.jpg", jpeg()), *sample(name, "a"), (f"{name}/odd.txt", b"c")]), kept="a",
          rejects=(("odd", "missing_caption"), ("odd", "missing_image")), require_caption=True),
    _kind("tar-duplicate-key", "two samples with one key", lambda name: tar_bytes([*sample(name, "a"), *sample(name, "z"), *sample(name, "a")]),
          rejects=(("a", "duplicate_key"),), note="the first is kept"),
    _kind("tar-upper-case-suffix", "a picture named odd.JPG", _named("{}/odd.JPG"), kept=ODD_KEPT),
    _kind("tar-two-dots", "a picture named odd.v2.jpg", _named("{}/odd.v2.jpg"), rejects=(("odd", "missing_image"),),
          note="as in WebDataset, a key ends at the first dot: the suffix is v2.jpg"),
    _kind("tar-frames-of-a-film", "3000 members of one key, film.00000.jpg and so on", _frames, rejects=(("film", "missing_image"),)),
    _kind("tar-only-a-suffix", "a member named .jpg", _named("{}/.jpg"), rejects=((".jpg", "missing_image"),)),
    _kind("tar-zero-byte-image", "a picture of zero bytes", lambda name: with_neighbours(name, (f"{name}/odd.jpg", b"")),
          rejects=(("odd", "empty_image"),)),
    Kind("tar-65-mib-jpg", "tar", "a picture of 65 MiB", _sparse_file("odd.jpg"), ("a", "z"), (("odd", "sample_too_large"),),
         note="it is passed over, not read"),
    Kind("tar-3000-mib-mp4", "tar", "a film of 3 GB beside a picture", _sparse_file("odd.mp4", 3000), ("a", "odd", "z"),
         note="it is passed over, not read"),
    Kind("tar-65-mib-txt", "tar", "a caption of 65 MiB", _sparse_file("odd.txt"), ("a", "z"), (("odd", "sample_too_large"),),
         note="it is passed over, not read"),
]  # fmt: skip

KINDS = CUT + MEMBERS
