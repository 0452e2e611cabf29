"""Reading the content of each input from the body of a request, within limits."""

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
CLOSE = {"Connection": "close"}  # the rest of the request is not read


@dataclass(frozen=True)
class Limits:
    """Limits on one request.

    Args:
        body_bytes: Maximum size of the body of a request.
        text_bytes: Maximum size of a text input; the time and memory for it grow with its length.
        seconds: Time in which the request must have arrived.
    """

    body_bytes: int = 10 * MEBIBYTE
    text_bytes: int = MEBIBYTE // 4
    seconds: float = 10.0


LIMITS = Limits()


def is_text(media_type: str) -> bool:
    """Whether an input of this media type is typed as text; otherwise a file is uploaded."""
    return media_type.startswith("text/")


async def read_inputs(request: Request, inputs: Mapping[str, str], limits: Limits) -> dict[str, bytes]:
    """Read the content of each input from a JSON object or a form.

    Args:
        request: The request; its body has not been read.
        inputs: Media type of each input, by name.
        limits: Limits on the request.

    Raises:
        HTTPException: The request is too slow (408), too large (413), of another type (415), or does not fit the model
            (422); the detail states the reason.
    """
    body = await _read_body(request, limits)
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "application/json":
            contents = _from_json(body, inputs)
        case "multipart/form-data":
            contents = await _from_form(request, body, inputs)
        case other:
            message = f"unsupported content type {other or '(none)'}: expected application/json or multipart/form-data"
            raise HTTPException(415, message)
    for name, content in contents.items():
        if is_text(inputs[name]) and len(content) > limits.text_bytes:
            raise HTTPException(
                413, f"{name} is too large: expected at most {limits.text_bytes:,} bytes, got {len(content):,}"
            )
    return contents


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"the request is too large: expected at most {limits.body_bytes:,} bytes", CLOSE)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        raise too_large
    # A client may announce a false length, or none: the chunks are counted as well.
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
        raise HTTPException(400, "the client closed the connection") from None
    return bytes(body)


def _from_json(body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    try:
        contents = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise HTTPException(422, f"the body is not a JSON object with {_names(inputs)}")
    _check_names(contents, inputs)
    return {name: _content(name, value, inputs[name]) for name, value in contents.items()}


def _check_names(contents: Mapping[str, object], inputs: Mapping[str, str]) -> None:
    if contents.keys() != inputs.keys():
        raise HTTPException(422, f"the inputs do not fit the model: expected {_names(inputs)}, got {_names(contents)}")


def _content(name: str, value: Any, media_type: str) -> bytes:
    if not isinstance(value, str):
        raise HTTPException(422, f"{name} is not a string")
    try:
        return value.encode() if is_text(media_type) else base64.b64decode(value, validate=True)
    except ValueError as error:
        expected = "a valid text" if is_text(media_type) else "the content of a file in base64"
        raise HTTPException(422, f"{name} is not {expected}: {error}") from None


async def _from_form(request: Request, body: bytes, inputs: Mapping[str, str]) -> dict[str, bytes]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    # Starlette refuses a malformed form with 400 and the reason.
    # The body was read within the limits above, so the form parser gets it from memory.
    async with Request(request.scope, replay).form(max_files=8, max_fields=8, max_part_size=len(body)) as form:
        _check_names(form, inputs)
        return {
            name: await value.read() if isinstance(value, UploadFile) else value.encode("utf-8", "surrogateescape")
            for name, value in form.items()
        }


def _names(names: Mapping[str, object]) -> str:
    return " and ".join(map(repr, list(names)[:8])) or "nothing"
