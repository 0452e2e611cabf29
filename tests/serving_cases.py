"""Untrained models for serving, and a server in a thread of this process."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import torch
from fastapi import FastAPI

from transfer import DataSpec
from transfer.config.check import load_component
from transfer.deployment.serving.app import make_app
from transfer.deployment.serving.batching import BATCHING, Batching
from transfer.deployment.serving.models import ServedModel
from transfer.deployment.serving.reading import LIMITS, Limits
from transfer.deployment.serving.server import PRIVATE, Publication, make_server
from transfer.models.assemble import assemble
from transfer.models.saved_model import LoadedModel


def loaded_model(backbone: dict[str, Any], field: str, classes: tuple[str, ...]) -> LoadedModel:
    """Return a model with random weights."""
    torch.manual_seed(0)
    data = DataSpec((field,), "class", classes)
    head = load_component("head", {"name": "linear"}, "test")
    task = load_component("task", {"name": "classification"}, "test")
    built_backbone = load_component("backbone", backbone, "test").make()
    built_task, model = assemble(built_backbone, head, task, data)
    model.eval()
    return LoadedModel(model, built_backbone, built_task, data)


@dataclass(frozen=True)
class Running:
    """A server that listens on loopback.

    Args:
        port: Port of the server.
    """

    port: int

    @property
    def address(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of a response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def predict(self, model: str, inputs: object) -> tuple[int, dict[str, Any]]:
        """Request a prediction in JSON."""
        headers = {"Content-Type": "application/json"}
        return self.ask("POST", f"/models/{model}/predict", json.dumps(inputs).encode(), headers)


@contextmanager
def running(
    models: Sequence[ServedModel],
    *,
    limits: Limits = LIMITS,
    batching: Batching = BATCHING,
    publication: Publication = PRIVATE,
) -> Iterator[Running]:
    """Serve models on a free port of loopback."""
    access_log = publication.access_log
    app = make_app(models, limits=limits, batching=batching, hosts=["127.0.0.1"], access_log=access_log)
    with running_app(app, limits, publication) as server:
        yield server


@contextmanager
def running_app(app: FastAPI, limits: Limits = LIMITS, publication: Publication = PRIVATE) -> Iterator[Running]:
    """Serve an application on a free port of loopback."""
    server = make_server(app, limits, publication)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Running(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
