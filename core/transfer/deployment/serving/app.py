"""The web application: a page, the list of models, and their predictions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from transfer import __version__
from transfer.deployment.serving.batching import BATCHING, Batcher, Batching, BusyError
from transfer.deployment.serving.decoders import Decoders
from transfer.deployment.serving.guards import (
    LOOPBACK_HOSTS,
    AccessLog,
    Gate,
    HostGuard,
    Tokens,
    path_of,
    refuse_other_origins,
)
from transfer.deployment.serving.metrics import Metrics
from transfer.deployment.serving.models import Prediction, RefusedError, Request as Inputs, ServedModel
from transfer.deployment.serving.reading import CLOSE, LIMITS, RETRY, Intake, Limits, is_text, read_inputs
from transfer.errors import UserError

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
    401: "A token is missing or wrong.",
    403: "The request comes from a page of another site.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The body is neither JSON nor a form.",
    422: "The inputs do not fit the model.",
    503: "Too many requests are waiting, or the server stops.",
    504: "The request was not answered in time.",
}

_UNWATCHED_SECONDS = 0.05
"""Time after which the connection of a request that waits for its answer is watched."""


class Endpoint:
    """A model under its name; a newer version can replace it between two requests.

    Args:
        model: The model.
        batching: Settings of the batches.
        decoders: Workers that decode files.
        metrics: Metrics of the application.
    """

    def __init__(self, model: ServedModel, batching: Batching, decoders: Decoders, metrics: Metrics) -> None:
        self.model = model
        self.batcher: Batcher[tuple[ServedModel, Any], Prediction] = Batcher(self._work, batching)
        self.decoding = 0
        self._decoders = decoders
        self._metrics = metrics
        metrics.record_version(model.name, model.version)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a batch or are decoded."""
        return self.batcher.waiting + self.decoding

    def replace(self, model: ServedModel) -> None:
        """Use another model for new requests; those in progress keep the one that they started with."""
        self._metrics.record_version(model.name, model.version, self.model.version)
        self.model = model

    def answer(self, model: ServedModel, contents: Inputs) -> asyncio.Future[Prediction]:
        """Return the prediction of a model for the inputs of a request, as a future.

        The future raises RefusedError if the inputs cannot be read.

        Raises:
            BusyError: Too many requests are waiting.
        """
        if not model.decodes_files:
            return self.batcher.submit((model, contents))
        if self.waiting >= self.batcher.settings.max_waiting:
            raise BusyError
        return asyncio.create_task(self._decode_and_answer(model, contents))

    async def _decode_and_answer(self, model: ServedModel, contents: Inputs) -> Prediction:
        # Images are not decoded in the thread of the model, so a large one does not stall the other requests.
        self.decoding += 1
        try:
            item = await self._decoders.encode(model, contents)
        finally:
            self.decoding -= 1
        if isinstance(item, Exception):
            try:
                raise item
            finally:
                del item  # otherwise the error and this frame refer to each other, and keep the inputs in memory
        return await self.batcher.submit((model, item))

    def _work(self, items: Sequence[tuple[ServedModel, Any]]) -> list[Prediction | Exception]:
        self._metrics.record_batch(self.model.name, len(items))
        results: dict[int, Prediction | Exception] = {}
        # There are two models in a batch only directly after a reload.
        for model in {id(model): model for model, _ in items}.values():
            indices = [index for index, (other, _) in enumerate(items) if other is model]
            values = [items[index][1] for index in indices]
            predict = model.predict_encoded if model.decodes_files else model.predict
            results |= zip(indices, predict(values), strict=True)
        return [results[index] for index in range(len(items))]


def make_app(
    models: Sequence[ServedModel],
    *,
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
    tokens: Tokens | None = None,
    access_log: AccessLog = "off",
    decoders: Decoders | None = None,
) -> FastAPI:
    """Return the application with all its guards, for uvicorn or any other ASGI server.

    Args:
        models: The models; their names are unique.
        limits: Limits on requests.
        batching: Settings of the batches that requests are collected into.
        hosts: Host names of the server; ``*`` accepts all. Requests for other names are refused: they come from a page
            of another site that resolves its own name to this machine (DNS rebinding).
        tokens: Bearer tokens that clients need; None needs none.
        access_log: Format of the lines that the logger ``transfer.access`` gets: off, text or json.
        decoders: Workers that decode files; the application closes them. None uses threads.
    """
    workers = decoders or Decoders()
    metrics = Metrics()
    intake = Intake(limits)
    endpoints = {model.name: Endpoint(model, batching, workers, metrics) for model in models}
    metrics.watch(endpoints, intake)

    @asynccontextmanager
    async def batches(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for endpoint in endpoints.values():
                await stack.enter_async_context(endpoint.batcher)
            yield
        workers.close()

    app = FastAPI(
        title="transfer",
        version=__version__,
        summary="Predictions of trained models.",
        lifespan=batches,
        docs_url=None,  # FastAPI's documentation pages load their code from other servers
        redoc_url=None,
    )
    app.state.endpoints = endpoints
    app.state.tokens = tokens or Tokens()
    predict_routes: dict[str, APIRoute] = {}
    app.add_middleware(PredictionMiddleware, routes=predict_routes)
    app.add_middleware(HostGuard, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Gate, tokens=app.state.tokens, access_log=access_log, record=metrics.record_request)

    for path, (file, media_type) in _PAGE.items():
        app.add_api_route(path, _file(file, media_type), methods=["GET"], include_in_schema=False)

    def stuck() -> list[str]:
        return [name for name, one in endpoints.items() if one.batcher.busy_seconds > limits.answer_seconds]

    @app.get("/health", summary="Status of the server, and number of waiting requests")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": {name: endpoint.waiting for name, endpoint in endpoints.items()}}

    @app.get("/health/live", summary="Whether the server responds")
    async def live() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/health/ready", summary="Whether the models can answer: 503 if one computes longer than the deadline")
    async def ready(response: Response) -> dict[str, Any]:
        response.status_code = 503 if stuck() else 200
        return {"status": "stuck" if stuck() else "ok", "stuck": stuck()}

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/models", summary="The models, with their inputs and classes")
    async def list_models() -> dict[str, Any]:
        max_bytes = {"body": limits.body_bytes, "text": limits.text_bytes}
        return {"models": [endpoint.model.describe() for endpoint in endpoints.values()], "max_bytes": max_bytes}

    for endpoint in endpoints.values():
        endpoint.model.warm_up(batching.max_size)
        _add_predict(app, endpoint, intake)
    predict_routes |= {r.path: r for r in app.routes if isinstance(r, APIRoute) and r.methods == {"POST"}}
    return app


def replace_models(app: FastAPI, models: Sequence[ServedModel], batch_size: int = BATCHING.max_size) -> None:
    """Replace the models of an application by newer versions with the same names and inputs.

    Args:
        app: Application of :func:`make_app`.
        models: The newer versions.
        batch_size: Size of the batch with which each is warmed up before the first is replaced.

    Raises:
        UserError: A model has another name or other inputs.
    """
    endpoints: dict[str, Endpoint] = app.state.endpoints
    for model in models:
        inputs = model.describe()["inputs"]
        served = endpoints[model.name].model.describe()["inputs"] if model.name in endpoints else None
        if inputs != served:
            fix = "start the server again: only weights, classes and labels can change while it runs"
            raise UserError(f"model {model.name} has other inputs: expected {served}, got {inputs}", fix=fix)
        model.warm_up(batch_size)
    for model in models:
        endpoints[model.name].replace(model)


class PredictionMiddleware:
    """Middleware that answers requests for predictions without FastAPI's routing and validation of requests.

    They would take as much processor time as the rest of a request. FastAPI's route with the same path documents it.

    Args:
        app: The application.
        routes: FastAPI's routes for predictions, by path.
    """

    def __init__(self, app: ASGIApp, *, routes: Mapping[str, APIRoute]) -> None:
        self.app, self.routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self.routes.get(path_of(scope)) if is_post else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route  # for the metrics
        response: Response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _add_predict(app: FastAPI, endpoint: Endpoint, intake: Intake) -> None:
    model = endpoint.model
    inputs: dict[str, str] = model.describe()["inputs"]
    limits = intake.limits

    async def predict(request: Request) -> Response:
        model = endpoint.model
        try:
            refuse_other_origins(request)
            with intake.request() as reserve:
                contents = await read_inputs(request, inputs, limits, reserve)
                prediction = await _within(limits.answer_seconds, request, endpoint.answer(model, contents))
        except HTTPException as error:
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        except RefusedError as error:
            return JSONResponse({"detail": str(error)}, 422)
        except BusyError:
            return JSONResponse({"detail": "too many requests are waiting; try again in a second"}, 503, RETRY)
        except asyncio.CancelledError:  # by uvicorn, when the time to stop has passed
            return JSONResponse({"detail": "the server stops"}, 503, CLOSE)
        return JSONResponse(prediction, headers={"X-Model-Version": model.version})

    def schema(file: dict[str, str]) -> dict[str, Any]:
        properties: dict[str, dict[str, str]]
        properties = {name: {"type": "string"} | ({} if is_text(kind) else file) for name, kind in inputs.items()}
        return {"schema": {"type": "object", "properties": properties, "required": list(inputs)}}

    # The example in the API description is a real prediction.
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
        response_class=JSONResponse,
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


async def _within(seconds: float, request: Request, answer: asyncio.Future[Prediction]) -> Prediction:
    """Return the result of a future, and cancel it if it takes too long or the client disconnects.

    Raises:
        HTTPException: The time has passed (504), or the client has disconnected.
    """
    disconnected: asyncio.Future[Any] | None = None
    try:
        # Most answers take milliseconds. Only during a longer one, a task watches the connection.
        unwatched = min(seconds, _UNWATCHED_SECONDS)
        await asyncio.wait({answer}, timeout=unwatched)
        if not answer.done():
            # The body has been read: the next message is that the client has disconnected.
            disconnected = asyncio.ensure_future(request.receive())
            tasks: set[asyncio.Future[Any]] = {answer, disconnected}
            await asyncio.wait(tasks, timeout=seconds - unwatched, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if disconnected is not None and disconnected.done():
            raise HTTPException(400, "the client closed the connection")
        raise HTTPException(504, f"the request was not answered within {seconds:g} seconds", RETRY)
    finally:
        answer.cancel()
        if disconnected is not None:
            disconnected.cancel()


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    # Read once at the start, so that a request opens no file.
    content = (resources.files("transfer.deployment.serving") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
