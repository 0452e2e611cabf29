"""Reading the content of each input from the body of a request, within limits."""

from __future__ import annotations

import asyncio
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from fastapi import HTTPException, Request
from python_multipart.multipart import parse_options_header

MEBIBYTE = 2**20
MAX_BODIES = 16
"""Number of bodies of the maximum size that all requests in progress may contain together."""
MAX_INPUTS = 8
_LARGE_JSON_BYTES = MEBIBYTE // 16
_CHUNK_BYTES = MEBIBYTE // 4
_MAX_BOUNDARY_BYTES = 70  # RFC 2046
_MAX_HEAD_BYTES = 8192
_BEFORE_STRING = re.compile(r"[\s{:,]{1,32}+\"")
_END = re.compile(r"\s*+}\s*+")
CLOSE = {"Connection": "close"}  # the rest of the request is not read
RETRY = {"Retry-After": "1"}

Reserve = Callable[[int], None]


@dataclass(frozen=True)
class Limits:
    """Limits on requests.

    Args:
        body_bytes: Maximum size of the body of a request.
        text_bytes: Maximum size of a text input; the time and memory for it grow with its length.
        seconds: Time in which the request must have arrived.
        answer_seconds: Time in which a request that has arrived must be answered.
        requests: Maximum number of requests for predictions that are read or answered at the same time.
    """

    body_bytes: int = 10 * MEBIBYTE
    text_bytes: int = MEBIBYTE // 4
    seconds: float = 10.0
    answer_seconds: float = 30.0
    requests: int = 256

    @property
    def total_bytes(self) -> int:
        """Maximum size of the bodies of all requests in progress."""
        return MAX_BODIES * self.body_bytes


LIMITS = Limits()


def is_text(media_type: str) -> bool:
    """Whether an input of this media type is typed as text; otherwise a file is uploaded."""
    return media_type.startswith("text/")


class Intake:
    """The requests for predictions in progress: their number, and the size of their bodies.

    Args:
        limits: Limits on the requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.body_bytes = 0

    @contextmanager
    def request(self) -> Iterator[Reserve]:
        """Count a request until the block ends. The block gets the function that counts the bytes of its body.

        Raises:
            HTTPException: There are too many requests, or their bodies are too large together (503).
        """
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            if self.body_bytes + size > self.limits.total_bytes:
                raise HTTPException(503, "the requests in progress are too large together", CLOSE | RETRY)
            reserved += size
            self.body_bytes += size

        if self.requests >= self.limits.requests:
            raise HTTPException(503, "too many requests are in progress", CLOSE | RETRY)
        self.requests += 1
        try:
            yield reserve
        finally:
            self.requests -= 1
            self.body_bytes -= reserved


async def read_inputs(
    request: Request, inputs: Mapping[str, str], limits: Limits, reserve: Reserve = lambda size: None
) -> dict[str, bytes]:
    """Read the content of each input from a JSON object or a form.

    Args:
        request: The request; its body has not been read.
        inputs: Media type of each input, by name.
        limits: Limits on the request.
        reserve: Function that is called with the size of each part of the body before it is kept.

    Raises:
        HTTPException: The request is too slow (408), too large (413), of another type (415), or does not fit the model
            (422); the detail states the reason.
    """
    body = await _read_body(request, limits, reserve)
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "application/json":
            contents = await _from_json(body, inputs)
        case "multipart/form-data":
            contents = await _from_form(request.headers["content-type"], body, inputs)
        case other:
            message = f"unsupported content type {other or '(none)'}: expected application/json or multipart/form-data"
            raise HTTPException(415, message)
    for name, content in contents.items():
        if is_text(inputs[name]) and len(content) > limits.text_bytes:
            raise HTTPException(
                413, f"{name} is too large: expected at most {limits.text_bytes:,} bytes, got {len(content):,}"
            )
    return contents


async def _read_body(request: Request, limits: Limits, reserve: Reserve) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        raise _too_large(limits)
    # A client may announce a false length, or none: the chunks are counted as well.
    body = bytearray()
    arriving = True
    try:
        async with asyncio.timeout(limits.seconds):
            while arriving:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise HTTPException(400, "the client closed the connection")
                chunk, arriving = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits)
                reserve(len(chunk))
                body += chunk
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {limits.seconds:g} seconds", CLOSE) from None
    return bytes(body)


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the request is too large: expected at most {limits.body_bytes:,} bytes", CLOSE)


async def _from_json(body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        if len(text) > _LARGE_JSON_BYTES and not _is_flat(text):
            raise HTTPException(422, f"the body is not a JSON object of strings with {_names(inputs)}")
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise HTTPException(422, f"the body is not a JSON object with {_names(inputs)}")
    _check_names(contents, inputs)
    return {name: await _content(name, value, inputs[name]) for name, value in contents.items()}


def _is_flat(text: str) -> bool:
    """Whether a JSON text is an object of a few strings, or invalid.

    The parser would block all other requests for seconds if a large text consisted of millions of numbers or lists.
    """
    position = 0
    for _ in range(2 * MAX_INPUTS):
        if not (before := _BEFORE_STRING.match(text, position)):
            break
        try:
            _, position = scanstring(text, before.end())
        except ValueError:
            return True
    return _END.fullmatch(text, position) is not None


def _check_names(contents: Mapping[str, object], inputs: Mapping[str, str]) -> None:
    if contents.keys() != inputs.keys():
        raise HTTPException(422, f"the inputs do not fit the model: expected {_names(inputs)}, got {_names(contents)}")


async def _content(name: str, value: Any, media_type: str) -> bytes:
    if not isinstance(value, str):
        raise HTTPException(422, f"{name} is not a string")
    try:
        return value.encode() if is_text(media_type) else await _from_base64(value)
    except ValueError as error:
        expected = "a valid text" if is_text(media_type) else "the content of a file in base64"
        raise HTTPException(422, f"{name} is not {expected}: {error}") from None


async def _from_base64(text: str) -> bytes:
    chunks: list[bytes] = []
    # Decoding 9 MiB takes 40 ms: other requests get a turn after each chunk.
    for start in range(0, len(text), _CHUNK_BYTES):
        if chunks and len(chunks[-1]) != _CHUNK_BYTES // 4 * 3:
            raise ValueError("excess data after padding")
        chunks.append(binascii.a2b_base64(text[start : start + _CHUNK_BYTES], strict_mode=True))
        await asyncio.sleep(0)
    return b"".join(chunks)


async def _from_form(content_type: str, body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    # Not by Starlette's parser: it works in Python, and needs 0.1 s for a form of 9 MiB with many line breaks.
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise HTTPException(400, "the form is malformed: its content type contains no valid boundary")
    parts = await _split(b"\r\n" + body, b"\r\n--" + boundary)
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise HTTPException(400, f"the form is malformed: expected at most {MAX_INPUTS} parts and its end")
    contents = dict(_read_part(part) for part in parts[1:-1])
    _check_names(contents, inputs)
    return contents


async def _split(body: bytes, delimiter: bytes) -> list[bytes]:
    """Split a body at a delimiter, at most so often that there are as many parts as inputs, a preamble and an end."""
    parts: list[bytes] = []
    start = position = 0
    while position < len(body) and len(parts) <= MAX_INPUTS:
        # Found in steps, so that other requests get a turn: repeated beginnings of the delimiter make it slow.
        index = body.find(delimiter, position, position + _CHUNK_BYTES)
        if index < 0:
            position += _CHUNK_BYTES - len(delimiter) + 1
            await asyncio.sleep(0)
            continue
        parts.append(body[start:index])
        start = position = index + len(delimiter)
    return [*parts, body[start:]]


def _read_part(part: bytes) -> tuple[str, bytes]:
    """Return the name and content of a part of a form."""
    head, _, content = part.partition(b"\r\n\r\n")
    for line in head[:_MAX_HEAD_BYTES].split(b"\r\n"):
        header, _, value = line.partition(b":")
        if header.strip().lower() == b"content-disposition":
            kind, options = parse_options_header(value.strip())
            if kind == b"form-data" and b"name" in options:
                return options[b"name"].decode("utf-8", "replace"), content
    raise HTTPException(400, "the form is malformed: a part has no name")


def _names(names: Mapping[str, object]) -> str:
    return " and ".join(map(repr, list(names)[:MAX_INPUTS])) or "nothing"
