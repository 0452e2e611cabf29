"""From the body of a request to the content of each input, within limits."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import Message

MEBIBYTE = 2**20
CLOSE = {"Connection": "close"}  # what the client still sends is not read


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Args:
        body_bytes: Of a whole request.
        text_bytes: Of a text within it: time and memory grow with its length.
        seconds: In which it must have arrived.
    """

    body_bytes: int = 10 * MEBIBYTE
    text_bytes: int = MEBIBYTE // 4
    seconds: float = 10.0


LIMITS = Limits()


def is_text(media_type: str) -> bool:
    """Whether a person types what is of this media type."""
    return media_type.startswith("text/")


async def read_inputs(request: Request, inputs: Mapping[str, str], limits: Limits) -> dict[str, bytes]:
    """Read the content of each input from a JSON object or a form.

    Args:
        request: Whose body has not been read.
        inputs: The media type of each input, by name.
        limits: Beyond which it is refused.

    Raises:
        HTTPException: 408 too slow, 413 too large, 415 of another type, 422 not what the model takes: in words.
    """
    body = await _read_body(request, limits)
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "application/json":
            given = _from_json(body, inputs)
        case "multipart/form-data":
            given = await _from_form(request, body, inputs)
        case other:
            message = f"the body is {other or 'of no type'}; send application/json or multipart/form-data"
            raise HTTPException(415, message)
    for name, content in given.items():
        if is_text(inputs[name]) and len(content) > limits.text_bytes:
            raise HTTPException(413, f"{name} has {len(content):,} bytes, and {limits.text_bytes:,} are the most")
    return given


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"a request has at most {limits.body_bytes:,} bytes", CLOSE)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {limits.seconds:g} seconds", CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request broke off") from None
    return bytes(body)


def _from_json(body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise HTTPException(422, f"the body is no JSON object with {_names(inputs)}")
    _check_names(given, inputs)
    return {name: _content(name, value, inputs[name]) for name, value in given.items()}


def _check_names(given: Mapping[str, object], inputs: Mapping[str, str]) -> None:
    if given.keys() != inputs.keys():
        raise HTTPException(422, f"send {_names(inputs)}, and nothing else; this request has {_names(given)}")


def _content(name: str, value: Any, media_type: str) -> bytes:
    if not isinstance(value, str):
        raise HTTPException(422, f"{name} is no string")
    try:
        return value.encode() if is_text(media_type) else base64.b64decode(value, validate=True)
    except ValueError as error:
        wanted = "a text" if is_text(media_type) else "the content of a file in base64"
        raise HTTPException(422, f"{name} is not {wanted}: {error}") from None


async def _from_form(request: Request, body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    # Starlette answers a broken form with 400 and the reason.
    async with Request(request.scope, replay).form(max_files=8, max_fields=8, max_part_size=len(body)) as form:
        _check_names(form, inputs)
        return {
            name: await value.read() if isinstance(value, UploadFile) else value.encode("utf-8", "surrogateescape")
            for name, value in form.items()
        }


def _names(names: Mapping[str, object]) -> str:
    return " and ".join(map(repr, list(names)[:8])) or "nothing"
