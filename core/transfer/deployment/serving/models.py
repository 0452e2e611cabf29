"""A trained model that answers requests in batches."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from transfer.errors import DataError
from transfer.interfaces import Preprocessing
from transfer.models.model_json import DESCRIPTION, WEIGHTS
from transfer.models.precision import place
from transfer.models.saved_model import LoadedModel, find_model, read_model
from transfer.runs.answers import answers_of
from transfer.runs.occlusion import outputs_of_encoded
from transfer.system.devices import resolve_device

logger = logging.getLogger(__name__)

MAX_BATCH_STEPS = 2**16
"""Number of tokens in a batch, padding included: it keeps a long text from padding a large batch to its length."""

MAX_PICKLED_BYTES = 2**16
"""Size of an encoder that is sent to another process with each request."""

Request = Mapping[str, bytes]
"""Content of each input by name: of a file, or a text in UTF-8."""

Prediction = dict[str, Any]


class RefusedError(Exception):
    """A request cannot be answered, for a reason that the client can correct."""


class Encoder:
    """Preprocessing of a model for requests.

    Args:
        name: Name of the model.
        preprocessing: Preprocessing of the backbone.
        inputs: Preprocessing of each input, by name.
    """

    def __init__(self, name: str, preprocessing: Preprocessing, inputs: Mapping[str, Preprocessing]) -> None:
        self.name, self.preprocessing, self.inputs = name, preprocessing, inputs

    def encode(self, request: Request) -> Any:
        """Return a request as the preprocessing encodes it, or the exception if it cannot be encoded."""
        try:
            return self._encode(request)
        except RefusedError as error:
            return _without_traceback(error)
        except Exception as error:
            logger.exception("an input of model %s cannot be encoded", self.name)
            return _without_traceback(error)

    def encode_all(self, requests: Sequence[Request]) -> list[Any]:
        """Return several requests as :meth:`encode` does, but encode them together, which is faster."""
        try:
            return list(self.preprocessing.encode([self._read(request) for request in requests]))
        except Exception:  # the error of one request: only that one gets it
            return [self.encode(request) for request in requests]

    def _read(self, request: Request) -> Any:
        """Return the raw value of a request."""
        values = []
        for name, reader in self.inputs.items():
            try:
                values.append(reader.read_bytes(request[name]))
            except (ValueError, OSError) as error:
                raise RefusedError(f"{name} cannot be read: {error}") from error
            except DataError as error:  # its location is a path of the server, which the client must not see
                raise RefusedError(f"{name}: " + "; ".join(problem.message for problem in error.problems)) from error
        return tuple(values) if self.preprocessing.parts else values[0]

    def _encode(self, request: Request) -> Any:
        value = self._read(request)
        try:
            return self.preprocessing.encode([value])[0]
        except (ValueError, OSError) as error:
            raise RefusedError(f"{' and '.join(self.inputs)} cannot be read: {error}") from error


class ServedModel:
    """A trained model with a name.

    :meth:`predict_encoded` and :meth:`predict` must be called from one thread, and :meth:`encode` from any thread if
    the model :attr:`decodes_files`; otherwise from the same one.

    Args:
        name: Name of the model in URLs.
        loaded: The model; it is moved to the device.
        device: Device to compute on: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.
        version: Version of the model in responses.
    """

    def __init__(self, name: str, loaded: LoadedModel, device: str = "auto", version: str = "") -> None:
        self.name = name
        self.loaded = loaded
        self.version = version
        kinds = {reader.media_type.startswith("text/") for reader in self.inputs.values()}
        self.decodes_files = kinds != {True}
        self._encoder = Encoder(name, self.preprocessing, self.inputs)
        self.pickled_encoder = _pickled(self._encoder) if kinds == {False} else None
        # Text preprocessing caches words without a lock of its own: models of texts and files encode one by one.
        self._encoding: AbstractContextManager[object] = Lock() if len(kinds) > 1 else nullcontext()
        place(loaded.model, resolve_device(device, where="--device"))

    @classmethod
    def read(cls, name: str, run: str | Path, device: str = "auto") -> ServedModel:
        """Read the model of a run, or an exported model.

        Raises:
            transfer.UserError: There is no model, it is damaged, or the device is not available.
        """
        folder = find_model(run)
        loaded = read_model(folder)
        digest = hashlib.sha256()
        for file in (folder / DESCRIPTION, folder / WEIGHTS):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return cls(name, loaded, device, digest.hexdigest()[:12])

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the backbone."""
        return self.loaded.backbone.preprocessing

    @property
    def inputs(self) -> dict[str, Preprocessing]:
        """The preprocessing of each input by name: most models have one input, named like the backbone's field."""
        return dict(self.preprocessing.parts) or {self.loaded.backbone.field: self.preprocessing}

    def describe(self) -> dict[str, Any]:
        """Return the inputs, target and classes of the model as JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "inputs": {name: reader.media_type for name, reader in self.inputs.items()},
            "target": self.loaded.data.target,
            "classes": list(self.loaded.data.classes),
        }

    def example(self) -> Prediction | None:
        """Return the prediction for the backbone's own example; None if it has none."""
        value = self.preprocessing.example()
        return None if value is None else self._predict_encoded(list(self.preprocessing.encode([value])))[0]

    def warm_up(self, batch_size: int) -> None:
        """Predict the backbone's example as a batch, so that the first requests find allocated memory and kernels."""
        value = self.preprocessing.example()
        if value is not None:
            encoded = self.preprocessing.encode([value])[0]
            self.predict_encoded([encoded] * batch_size)

    def predict(self, requests: Sequence[Request]) -> list[Prediction | Exception]:
        """Return the prediction for each request, or its own exception if it cannot be answered."""
        with self._encoding:
            encoded = self._encoder.encode_all(requests)
        return self.predict_encoded(encoded)

    def encode(self, request: Request) -> Any:
        """Return a request as the model's preprocessing encodes it, or the exception if it cannot be encoded."""
        with self._encoding:
            return self._encoder.encode(request)

    def predict_encoded(self, values: Sequence[Any]) -> list[Prediction | Exception]:
        """Return the prediction for each encoded request. An exception is returned as it is."""
        results = {index: value for index, value in enumerate(values) if isinstance(value, Exception)}
        encoded = {index: value for index, value in enumerate(values) if index not in results}
        predicted: dict[int, Prediction | Exception] = dict(results)
        for indices in self._batches(encoded):
            predicted |= zip(indices, self._predict_or_fail([encoded[index] for index in indices]), strict=True)
        return [predicted[index] for index in range(len(values))]

    def _batches(self, encoded: Mapping[int, Any]) -> Iterator[list[int]]:
        """Yield the indices of values of similar length, the shortest first."""
        lengths = {index: max(self.preprocessing.length(value), 1) for index, value in encoded.items()}
        batch: list[int] = []
        for index in sorted(encoded, key=lambda index: lengths[index]):
            # All values of a batch are padded to the length of the last one.
            if batch and (len(batch) + 1) * lengths[index] > MAX_BATCH_STEPS:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _predict_or_fail(self, encoded: Sequence[Any]) -> list[Prediction | Exception]:
        """Return a prediction or an exception for each value. If a batch fails, each value is tried alone."""
        try:
            return list(self._predict_encoded(encoded))
        except Exception as error:
            if len(encoded) == 1:
                logger.exception("model %s failed", self.name)
                return [_without_traceback(error)]
            return [self._predict_or_fail([value])[0] for value in encoded]

    def _predict_encoded(self, encoded: Sequence[Any]) -> list[Prediction]:
        outputs = outputs_of_encoded(self.loaded, encoded)
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError("the outputs of the model are not finite")
        return answers_of(self.loaded, encoded, outputs)


def _pickled(encoder: Encoder) -> bytes | None:
    """Return an encoder for another process; None if it must stay in this one, or is too large to send often."""
    try:
        pickled = pickle.dumps(encoder)
    except Exception:  # the preprocessing of a plugin may raise any exception
        return None
    return pickled if len(pickled) <= MAX_PICKLED_BYTES else None


def _without_traceback(error: Exception) -> Exception:
    """Return an error without the frames in which it was raised.

    The frames contain decoded inputs, and one of them the error itself: such a cycle would keep them in memory until
    the next garbage collection.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
