"""What a file may hold in place of what it should: any bytes, damaged ones, or whole content that says odd things."""

import ast
import copy
import json
import struct
import tomllib
from collections.abc import Iterator
from typing import Any

import tomli_w
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NESTED: Any = json.loads("[" * 400 + "]" * 400)
ODD: list[Any] = [
    None, True, 0, -1, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    "", " ", ".", "..", "/", "digits", "0", "1e999", "x" * 300, "x" * 5000, "a\nb", "\0",
    "\x1b[31m", "\ud800", "é\u202e",
    [], {}, [[]], [None], [0, 0], [-1], [10**9, 10**9], {"": {}}, {"a": [{}]}, NESTED,
]  # fmt: skip
"""Values of every kind that a reader may meet where it expects another."""


ENDLESS = ["", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e" + "9" * 5000, "x" * 100_000, "a." * 10_000]
"""Texts that a parser may choke on, wherever a value is expected."""


def contents(valid: bytes, suffix: str) -> SearchStrategy[bytes]:
    """Contents for a file that should have the content `valid`: of five, three are whole and say something odd."""
    texts = st.text(max_size=200) | st.sampled_from([*ENDLESS, *(f"x = {text}" for text in ENDLESS)])
    other = st.sampled_from([b"\xef\xbb\xbf" + valid, valid.decode("latin1").encode("utf-16"), bytes(len(valid))])
    odd = _odd(valid, suffix)
    return st.one_of(st.binary(max_size=200) | texts.map(_coded) | other, _damaged(valid), odd, odd, odd)


def _coded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def _damaged(draw: DrawFn, valid: bytes) -> bytes:
    """Cut off, with other bytes in place of some, or with bytes put in."""
    place = draw(st.integers(0, len(valid)))
    new = draw(st.binary(max_size=8))
    return valid[:place] + draw(
        st.sampled_from([b"", valid[place:], new + valid[place + len(new) :], new + valid[place:]])
    )


def _odd(valid: bytes, suffix: str) -> SearchStrategy[bytes]:
    """Whole, and with odd values in it."""
    match suffix:
        case ".json":
            return _changed(json.loads(valid)).map(_json)
        case ".jsonl":
            return _changed([json.loads(line) for line in valid.splitlines()]).map(
                lambda lines: b"\n".join(map(_json, lines)) if isinstance(lines, list) else _json(lines)
            )
        case ".toml":
            return _changed(tomllib.loads(valid.decode())).map(_toml)
        case ".safetensors":
            size = struct.unpack("<Q", valid[:8])[0]
            header = json.loads(valid[8 : 8 + size])
            about = {key: _opened(text) for key, text in header.get("__metadata__", {}).items()}
            return _changed({**header, "__metadata__": about}).map(lambda new: _safetensors(new, valid[8 + size :]))
        case ".npy":
            size = struct.unpack("<H", valid[8:10])[0]
            header = ast.literal_eval(valid[10 : 10 + size].decode())
            return _changed(header).map(lambda new: _npy(new, valid[10 + size :]))
        case _:
            return _damaged(valid)


@st.composite
def _changed(draw: DrawFn, content: Any) -> Any:
    """Content with one or two of its parts removed, or replaced by an odd value or by another part."""
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(content))
        if not places:
            return draw(st.sampled_from(ODD))
        *way, last = draw(st.sampled_from(places))
        content = copy.deepcopy(content) if content is not NESTED else content
        inner = content
        for step in way:
            inner = inner[step]
        match draw(st.sampled_from(["odd", "odd", "other", "gone", "more"])):
            case "odd":
                inner[last] = draw(st.sampled_from(ODD))
            case "other":
                inner[last] = copy.deepcopy(_at(content, draw(st.sampled_from(places))))
            case "more" if isinstance(inner, dict):
                inner[draw(st.sampled_from(["", "name", "base", "x", "schema"]))] = draw(st.sampled_from(ODD))
            case _:
                del inner[last]
    return content


def _places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each part of some content; nowhere deeper than any file of ours goes."""
    if isinstance(content, dict | list) and len(way) < 12:
        for key in content if isinstance(content, dict) else range(len(content)):
            yield (*way, key)
            yield from _places(content[key], (*way, key))


def _at(content: Any, way: tuple[Any, ...]) -> Any:
    for step in way:
        content = content[step]
    return content


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _toml(content: Any) -> bytes:
    """As TOML, as far as TOML can say it."""
    try:
        return tomli_w.dumps(content).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):
        return f"x = {json.dumps(content)}".encode()


def _opened(text: str) -> Any:
    """What a text says, where it is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _safetensors(header: Any, data: bytes) -> bytes:
    if isinstance(header, dict) and isinstance(about := header.get("__metadata__"), dict):
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        header = {**header, "__metadata__": texts}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _npy(header: Any, data: bytes) -> bytes:
    text = _coded(f"{header!r}\n")[:65000]
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
