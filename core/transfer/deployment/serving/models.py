"""A trained model that answers requests, several at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transfer.data.batch import move
from transfer.errors import DataError
from transfer.interfaces import Preprocessing
from transfer.models.saved_model import LoadedModel, find_model, read_model

logger = logging.getLogger(__name__)

MAX_STEPS = 2**16
"""Tokens, padding included, that go through a model at once: one long text does not make a whole batch as long."""

Request = Mapping[str, bytes]
"""For each input of a model its content: that of a file, or a text in UTF-8."""

Answer = dict[str, Any]


class RefusedError(Exception):
    """A request cannot be answered, for a reason that whoever sent it can mend."""


class ServedModel:
    """A trained model and the name under which it answers. Its calls belong into one thread.

    Args:
        name: As it stands in addresses.
        loaded: The model; it is moved to the GPU if there is one.
    """

    def __init__(self, name: str, loaded: LoadedModel) -> None:
        self.name = name
        self.loaded = loaded
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded.model.to(self.device)

    @classmethod
    def read(cls, name: str, run: str | Path) -> ServedModel:
        """Read the model of a run, or an exported one.

        Raises:
            transfer.RunError: There is none, or it is damaged.
        """
        return cls(name, read_model(find_model(run)))

    @property
    def preprocessing(self) -> Preprocessing:
        """The backbone's."""
        return self.loaded.backbone.preprocessing

    @property
    def inputs(self) -> dict[str, Preprocessing]:
        """What reads each input: of most models there is one, called as the backbone's field."""
        return dict(self.preprocessing.parts) or {self.loaded.backbone.field: self.preprocessing}

    def describe(self) -> dict[str, Any]:
        """Say what the model takes and gives; JSON alone."""
        return {
            "name": self.name,
            "inputs": {name: reader.media_type for name, reader in self.inputs.items()},
            "target": self.loaded.data.target,
            "classes": list(self.loaded.data.classes),
        }

    def example(self) -> Answer | None:
        """Answer the backbone's own example, which also warms the model up; None where it brings none."""
        value = self.preprocessing.example()
        return None if value is None else self._interpret(list(self.preprocessing.encode([value])))[0]

    def answer(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """Answer some requests together; one that is wrong gets its own error and leaves the others alone."""
        answers: dict[int, Answer | Exception] = {}
        encoded: dict[int, Any] = {}
        for place, request in enumerate(requests):
            try:
                encoded[place] = self._encode(request)
            except Exception as error:
                answers[place] = error
        for places in self._batches(encoded):
            answers |= zip(places, self._try([encoded[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _encode(self, request: Request) -> Any:
        values = []
        for name, reader in self.inputs.items():
            try:
                values.append(reader.read_bytes(request[name]))
            except (ValueError, OSError) as error:
                raise RefusedError(f"{name} cannot be read: {error}") from error
            except DataError as error:  # its place is one of ours, of no use to whoever asks
                raise RefusedError(f"{name}: " + "; ".join(problem.message for problem in error.problems)) from error
        try:
            return self.preprocessing.encode([tuple(values) if self.preprocessing.parts else values[0]])[0]
        except (ValueError, OSError) as error:
            raise RefusedError(f"{' and '.join(self.inputs)} cannot be read: {error}") from error

    def _batches(self, encoded: Mapping[int, Any]) -> Iterator[list[int]]:
        """Yield the places of values of like lengths, the shortest first."""
        lengths = {place: max(self.preprocessing.length(value), 1) for place, value in encoded.items()}
        batch: list[int] = []
        for place in sorted(encoded, key=lambda place: lengths[place]):
            if batch and (len(batch) + 1) * lengths[place] > MAX_STEPS:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _try(self, encoded: Sequence[Any]) -> list[Answer | Exception]:
        try:
            return list(self._interpret(encoded))
        except Exception as error:
            if len(encoded) == 1:
                logger.exception("model %s failed", self.name)
                return [error]
            return [self._try([one])[0] for one in encoded]  # the fault of one is not that of the others

    def _interpret(self, encoded: Sequence[Any]) -> list[Answer]:
        inputs = move(self.preprocessing.collate(encoded), self.device)
        with torch.inference_mode():
            outputs = self.loaded.model(inputs).cpu()
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError("the model's output is not finite")
        return self.loaded.task.interpret(outputs)
