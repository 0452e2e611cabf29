"""The web application: a page, the list of models, and their predictions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from transfer import __version__
from transfer.deployment.serving.batching import BATCHING, Batcher, Batching, BusyError
from transfer.deployment.serving.models import Prediction, RefusedError, Request as Inputs, ServedModel
from transfer.deployment.serving.reading import LIMITS, Limits, is_text, read_inputs

_PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/script.js": ("script.js", "text/javascript"),
}
# The page may load only the files of this server, and must not be framed by another site.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_REFUSALS = {
    400: "The form is malformed.",
    403: "The request comes from a page of another site.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The body is neither JSON nor a form.",
    422: "The inputs do not fit the model.",
    503: "Too many requests are waiting.",
}


def make_app(
    models: Sequence[ServedModel],
    *,
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """Return the application, for uvicorn or any other ASGI server.

    Args:
        models: The models; their names are unique.
        limits: Limits on one request.
        batching: Settings of the batches that requests are collected into.
        hosts: Host names of the server. Requests for other names are refused: they come from a page of another site
            that resolves its own name to this machine (DNS rebinding).
    """
    batchers: dict[str, Batcher[Inputs, Prediction]] = {
        model.name: Batcher(model.predict, batching) for model in models
    }

    @asynccontextmanager
    async def batches(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for batcher in batchers.values():
                await stack.enter_async_context(batcher)
            yield

    app = FastAPI(
        title="transfer",
        version=__version__,
        summary="Predictions of trained models.",
        lifespan=batches,
        docs_url=None,  # FastAPI's documentation pages load their code from other servers
        redoc_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    for path, (file, media_type) in _PAGE.items():
        app.add_api_route(path, _file(file, media_type), methods=["GET"], include_in_schema=False)

    @app.get("/health", summary="Status of the server, and number of waiting requests")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": {name: batcher.waiting for name, batcher in batchers.items()}}

    @app.get("/models", summary="The models, with their inputs and classes")
    async def list_models() -> dict[str, Any]:
        max_bytes = {"body": limits.body_bytes, "text": limits.text_bytes}
        return {"models": [model.describe() for model in models], "max_bytes": max_bytes}

    for model in models:
        _add_predict(app, model, batchers[model.name], limits)
    return app


def _add_predict(app: FastAPI, model: ServedModel, batcher: Batcher[Inputs, Prediction], limits: Limits) -> None:
    inputs: dict[str, str] = model.describe()["inputs"]

    async def predict(request: Request) -> Prediction:
        _refuse_other_origins(request)
        contents = await read_inputs(request, inputs, limits)
        try:
            return await batcher.submit(contents)
        except RefusedError as error:
            raise HTTPException(422, str(error)) from error
        except BusyError:
            raise HTTPException(
                503, "too many requests are waiting; try again in a second", {"Retry-After": "1"}
            ) from None

    def schema(file: dict[str, str]) -> dict[str, Any]:
        properties: dict[str, dict[str, str]]
        properties = {name: {"type": "string"} | ({} if is_text(kind) else file) for name, kind in inputs.items()}
        return {"schema": {"type": "object", "properties": properties, "required": list(inputs)}}

    # The example in the API description is a real prediction: it also warms the model up before the first request.
    example = model.example()
    refusal: dict[str, Any] = {
        "application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}
    }
    success: dict[str, Any] = {"schema": {"type": "object"}} | ({"example": example} if example else {})
    responses: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": success}}}
    responses |= {status: {"description": description, "content": refusal} for status, description in _REFUSALS.items()}
    app.add_api_route(
        f"/models/{model.name}/predict",
        predict,
        methods=["POST"],
        operation_id=f"predict_{model.name}",
        summary=f"Predict with {model.name} from {' and '.join(inputs)}",
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


def _refuse_other_origins(request: Request) -> None:
    """Refuse a request from a page of another site: browsers send forms there without asking this server.

    Browsers name the site of the page in the header Origin; other clients do not send it.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "the request comes from a page of another site")


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    # Read once at the start, so that a request opens no file.
    content = (resources.files("transfer.deployment.serving") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
