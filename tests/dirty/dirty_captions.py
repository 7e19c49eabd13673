"""Kinds of captions, in a tar's .txt and .json members: encodings, lengths, and JSON that is not what it should be."""

from __future__ import annotations

from dirty_kind import Kind, Member, file_writer, jpeg, with_neighbours


def _kind(
    name: str, what: str, *texts: tuple[str, bytes], caption: str | None = None, reason: str = "", **more
) -> Kind:
    """A sample "odd" with these (suffix, bytes) beside its picture. caption: how it is read; else reason: why it is not."""

    def build(name: str) -> bytes:
        members: list[Member] = [(f"{name}/odd.{suffix}", data) for suffix, data in texts]
        return with_neighbours(name, (f"{name}/odd.jpg", jpeg()), *members)

    rejects = ((("odd", reason),)) if reason else ()
    kept = ("a", "z") if reason else ("a", "odd", "z")
    captions = {"a": "the picture a"} | ({} if caption is None else {"odd": caption})
    write = file_writer(name, ".tar", build)
    return Kind(name, "caption", what, write, kept, rejects, captions=captions, **more)


_LONG = "a word " * 150_000
_UNICODE = "ｆｕｌｌ, e\u0301 (two code points), \u202eright to left, \U0001f9f6, \x07"

KINDS = [
    _kind("caption-latin-1", "a caption in Latin-1", ("txt", b"caf\xe9"), reason="bad_caption_encoding"),
    _kind("caption-utf-16", "a caption in UTF-16", ("txt", "a café".encode("utf-16")), reason="bad_caption_encoding"),
    _kind("caption-byte-order-mark", "a caption that begins with a byte order mark", ("txt", b"\xef\xbb\xbfa cup"),
          caption="a cup", note="the mark is taken off"),
    _kind("caption-of-zero-bytes", "a .txt of zero bytes", ("txt", b""), caption="", require_caption=True,
          note="a caption that is there and empty"),
    _kind("caption-of-spaces", "a caption of spaces and newlines", ("txt", b" \n\t "), caption=" \n\t ", note="as it stands"),
    _kind("caption-of-a-megabyte", "a caption of a megabyte", ("txt", _LONG.encode()), caption=_LONG,
          note="whole; the model's tokenizer cuts it"),
    _kind("caption-with-nul", "zero bytes in a caption", ("txt", b"a\0b"), caption="a\0b", note="as it stands"),
    _kind("caption-odd-unicode", "combining and full-width characters, marks of direction, emoji, a bell",
          ("txt", _UNICODE.encode()), caption=_UNICODE, note="as it stands"),
    _kind("caption-surrogate-bytes", "a surrogate in a .txt", ("txt", b"a \xed\xa0\x80"), reason="bad_caption_encoding"),
    _kind("caption-txt-and-json", "a .txt and a .json with different captions", ("json", b'{"caption": "json"}'),
          ("txt", b"txt"), caption="txt", note="the .txt counts"),
    _kind("caption-broken-txt-sound-json", "a .txt in Latin-1 and a sound .json", ("json", b'{"caption": "json"}'),
          ("txt", b"\xe9"), reason="bad_caption_encoding"),
    _kind("json-of-zero-bytes", "a .json of zero bytes", ("json", b""), reason="bad_json"),
    _kind("json-cut", "a .json that ends early", ("json", b'{"caption": "a c'), reason="bad_json"),
    _kind("json-html", "an error page instead of JSON", ("json", b"<html>404</html>"), reason="bad_json"),
    _kind("json-list", "a list instead of an object", ("json", b'["a cup"]'), reason="bad_json"),
    _kind("json-null", "null instead of an object", ("json", b"null"), reason="bad_json"),
    _kind("json-caption-number", "a caption that is a number", ("json", b'{"caption": 7}'), reason="bad_json"),
    _kind("json-caption-list", "a list of captions", ("json", b'{"caption": ["a", "b"]}'), reason="bad_json"),
    _kind("json-caption-null", "a caption that is null, where captions are required", ("json", b'{"caption": null}'),
          reason="missing_caption", require_caption=True),
    _kind("json-caption-null-not-needed", "a caption that is null, where none is required", ("json", b'{"caption": null}'), caption=""),
    _kind("json-without-caption", "an object without caption, where captions are required", ("json", b'{"url": "x"}'),
          reason="missing_caption", require_caption=True),
    _kind("json-surrogate", "a lone surrogate, which JSON can spell and no file can hold", ("json", b'{"caption": "\\ud800"}'),
          reason="bad_caption_encoding"),
    _kind("json-surrogate-pair", "an emoji spelt as two surrogates", ("json", b'{"caption": "\\ud83d\\udc08"}'), caption="\U0001f408"),
    _kind("json-not-utf8", "JSON in Latin-1", ("json", b'{"caption": "caf\xe9"}'), reason="bad_caption_encoding"),
    _kind("json-byte-order-mark", "JSON that begins with a byte order mark", ("json", b'\xef\xbb\xbf{"caption": "a cup"}'),
          caption="a cup", note="the mark is taken off"),
    _kind("json-nan", "NaN among the other values, as Python writes it", ("json", b'{"caption": "a cup", "score": NaN}'),
          caption="a cup"),
    _kind("json-nested", "100,000 opening brackets", ("json", b"[" * 100_000), reason="bad_json"),
    _kind("json-huge-number", "a number of 10,000 digits", ("json", b'{"caption": "a", "n": ' + b"9" * 10_000 + b"}"), reason="bad_json"),
    _kind("json-caption-twice", "an object with two captions", ("json", b'{"caption": "first", "caption": "last"}'), caption="last"),
]  # fmt: skip
