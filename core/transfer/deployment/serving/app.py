"""The web application: a page, what models there are, and their predictions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

import transfer
from transfer.deployment.serving.batching import Batcher, BusyError
from transfer.deployment.serving.models import Answer, RefusedError, ServedModel
from transfer.deployment.serving.models import Request as Inputs
from transfer.deployment.serving.reading import LIMITS, Limits, is_text, read_inputs

_PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/script.js": ("script.js", "text/javascript"),
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_REFUSALS = {
    400: "The form is broken.",
    408: "The request arrived too slowly.",
    413: "The request is too large.",
    415: "The body is neither JSON nor a form.",
    422: "The request is not what the model takes.",
    503: "Too many requests wait.",
}


@dataclass(frozen=True)
class Batching:
    """How requests are put together.

    Args:
        most: Requests of a batch.
        wait_seconds: How long the first of a batch waits for others.
        most_waiting: Requests of a model that wait; more are refused.
    """

    most: int = 32
    wait_seconds: float = 0.002
    most_waiting: int = 128


BATCHING = Batching()


def make_app(
    models: Sequence[ServedModel],
    *,
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """Return the application, for uvicorn or any other ASGI server.

    Args:
        models: Under names of their own each.
        limits: What one request may cost.
        batching: How requests are put together.
        hosts: Names by which it may be called: a page of another site that resolves its own name to this machine
            is refused.
    """
    batchers: dict[str, Batcher[Inputs, Answer]] = {
        model.name: Batcher(
            model.answer, most=batching.most, wait_seconds=batching.wait_seconds, most_waiting=batching.most_waiting
        )
        for model in models
    }

    @asynccontextmanager
    async def batches(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for batcher in batchers.values():
                await stack.enter_async_context(batcher)
            yield

    app = FastAPI(
        title="transfer",
        version=transfer.__version__,
        summary="Predictions of trained models.",
        lifespan=batches,
        docs_url=None,  # these pages load their code from other servers
        redoc_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    for path, (file, media_type) in _PAGE.items():
        app.add_api_route(path, _file(file, media_type), methods=["GET"], include_in_schema=False)

    @app.get("/health", summary="Whether the server answers, and how many requests wait")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": {name: batcher.waiting for name, batcher in batchers.items()}}

    @app.get("/models", summary="The models, with what they take and give")
    async def list_models() -> dict[str, Any]:
        most = {"body": limits.body_bytes, "text": limits.text_bytes}
        return {"models": [model.describe() for model in models], "most_bytes": most}

    for model in models:
        _add_predict(app, model, batchers[model.name], limits)
    return app


def _add_predict(app: FastAPI, model: ServedModel, batcher: Batcher[Inputs, Answer], limits: Limits) -> None:
    inputs: dict[str, str] = model.describe()["inputs"]

    async def predict(request: Request) -> Answer:
        given = await read_inputs(request, inputs, limits)
        try:
            return await batcher.submit(given)
        except RefusedError as error:
            raise HTTPException(422, str(error)) from error
        except BusyError:
            raise HTTPException(503, "too many requests wait; try again in a second", {"Retry-After": "1"}) from None

    def schema(file: dict[str, str]) -> dict[str, Any]:
        properties: dict[str, dict[str, str]]
        properties = {name: {"type": "string"} | ({} if is_text(kind) else file) for name, kind in inputs.items()}
        return {"schema": {"type": "object", "properties": properties, "required": list(inputs)}}

    example = model.example()
    refusal: dict[str, Any] = {
        "application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}
    }
    answer: dict[str, Any] = {"schema": {"type": "object"}} | ({"example": example} if example else {})
    responses: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": answer}}}
    responses |= {status: {"description": words, "content": refusal} for status, words in _REFUSALS.items()}
    app.add_api_route(
        f"/models/{model.name}/predict",
        predict,
        methods=["POST"],
        operation_id=f"predict_{model.name}",
        summary=f"What {model.name} makes of {' and '.join(inputs)}",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": schema({"contentEncoding": "base64"}),
                    "multipart/form-data": schema({"format": "binary"}),
                },
            }
        },
        responses=responses,
    )


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = (resources.files("transfer.deployment.serving") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
