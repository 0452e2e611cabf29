"""A trained model that is read once and answers any number of calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from transfer.data.batch import Batch
from transfer.data.encoding import encode
from transfer.errors import DataError, RunError, UserError, unknown_name
from transfer.interfaces import Preprocessing
from transfer.models.forward import forward_batches
from transfer.models.model_json import DESCRIPTION
from transfer.models.precision import place
from transfer.models.recorded_plugins import changes_note
from transfer.models.saved_model import LoadedModel, find_model, plugin_changes, read_model
from transfer.runs.inference_device import inference_device
from transfer.runs.inputs import Input, value_inputs
from transfer.runs.occlusion import explain_output, outputs_of_encoded, refuse_non_finite
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json
from transfer.training.events import Note, Observer, ignore_events

PREDICTION_BATCH = 64
"""Number of inputs that go through the model together."""

OnError = Literal["fail", "skip"]
"""``fail``: raise the error of the first input that cannot be read. ``skip``: answer the others."""

_T = TypeVar("_T")


class Predictor:
    """A trained model on a device, with its preprocessing and the interpretation of its outputs.

    Args:
        folder: Model folder.
        loaded: Model that was read from the folder.
    """

    def __init__(self, folder: Path, loaded: LoadedModel) -> None:
        self.folder = folder
        self.loaded = loaded

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the backbone."""
        return self.loaded.backbone.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, labels or numbers, in the order of the outputs."""
        return self.loaded.data.classes

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, from input to output; the last one is ``head``."""
        return tuple(self.loaded.model.stages)

    def predict(
        self, values: Iterable[Any], *, explain: bool = False, on_error: OnError = "fail"
    ) -> list[dict[str, Any]]:
        """Predict a list of values; :func:`transfer.predict` describes them and the answers.

        Args:
            values: Strings, ``pathlib.Path`` objects of files or folders, or raw values (PIL images, arrays).
            explain: Whether to compute the effect of each piece of a value on its score.
            on_error: Whether the first value that cannot be read raises its error (``fail``) or gets an answer with an
                ``error`` (``skip``).

        Raises:
            UserError: A value cannot be read, or the backbone cannot divide its inputs into pieces.
        """
        return list(self.answers(value_inputs(values, self.preprocessing), explain=explain, on_error=on_error))

    def answers(
        self, inputs: Iterable[Input], *, explain: bool = False, on_error: OnError = "fail"
    ) -> Iterator[dict[str, Any]]:
        """Yield the answer to each input, in batches and in order.

        Args:
            inputs: Inputs; they may be read lazily.
            explain: Whether to compute the effect of each piece of an input on its score.
            on_error: Whether the first input that cannot be read raises its error or gets an answer with an ``error``.

        Raises:
            UserError: An input cannot be read, or the backbone cannot divide its inputs into pieces.
        """
        if explain and not self.preprocessing.explains:
            name = read_json(self.folder / DESCRIPTION, "there is no model here")["backbone"]["name"]
            fix = "predict without an explanation"
            raise RunError(f"backbone {name!r} cannot divide an input into pieces", where=str(self.folder), fix=fix)
        for batch in _batched(inputs):
            yield from self._answer_batch(batch, explain, on_error)

    def features(self, values: Iterable[Any], stage: str | None = None) -> Any:
        """Return the output of a stage for a list of values, on the CPU.

        Args:
            values: Strings, ``pathlib.Path`` objects of files or folders, or raw values (PIL images, arrays).
            stage: Name of a stage (:attr:`stages`). None uses the last stage of the backbone, the input of the head.

        Returns:
            Tensor (N, ...), float32 if it contains floats. A stage that returns sequences gives a pair of features
            (N, T, D), padded with zeros to the longest sequence, and their mask (N, T).

        Raises:
            UserError: A value cannot be read, there is no value or no such stage, or the stage passes on something else
                (several inputs of a fusion, for example).
        """
        stages = self.stages
        stage = stages[-2] if stage is None else stage
        if stage not in stages:
            raise UserError.of([unknown_name("stage", stage, stages, where=str(self.folder))])
        end, outputs = stages.index(stage) + 1, []
        for batch in _batched(value_inputs(values, self.preprocessing)):
            encoded = self._encode([_read(one) for one in batch], [one.where for one in batch])
            outputs.append(self._outputs(encoded, end))
            if not _has_row_per_value(outputs[-1], len(batch)):
                raise UserError(
                    f"the output of stage {stage!r} is not one tensor with a row for each value",
                    where=str(self.folder),
                    available=stages,
                    fix=f"use a later stage, such as {stages[-2]}",
                )
        if not outputs:
            raise UserError("there are no values: expected at least one")
        if isinstance(outputs[0], Tensor):
            return _join(outputs)
        return tuple(map(_join, zip(*outputs, strict=True)))

    def _outputs(self, encoded: Sequence[Any], end_stage: int) -> Any:
        model = self.loaded.model
        device = next(model.parameters()).device
        batch = Batch.without_targets(self.preprocessing, encoded)
        ((_, outputs),) = forward_batches(model, [batch], device=device, end_stage=end_stage)
        return _to_cpu(outputs) if isinstance(outputs, Tensor) else tuple(map(_to_cpu, outputs))

    def _answer_batch(self, inputs: Sequence[Input], explain: bool, on_error: OnError) -> Iterator[dict[str, Any]]:
        results: dict[int, dict[str, Any]] = {}
        values: dict[int, Any] = {}
        for index, one in enumerate(inputs):
            if one.is_blank:
                results[index] = self._no_answer | {"note": "the input is blank"}
                continue
            try:
                values[index] = _read(one)
            except DataError as error:
                if on_error == "fail":
                    raise
                results[index] = self._failed(error, one)
        results |= dict(self._answer_values(values, inputs, explain, on_error))
        for index, one in enumerate(inputs):
            yield {"input": one.name, **one.location, **results[index]}

    def _answer_values(
        self, values: dict[int, Any], inputs: Sequence[Input], explain: bool, on_error: OnError
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the index and the answer of each value."""
        if not values:
            return
        try:
            encoded = self._encode(list(values.values()), [inputs[index].where for index in values])
        except DataError as error:
            if on_error == "fail":
                raise
            if len(values) == 1:
                yield from ((index, self._failed(error, inputs[index])) for index in values)
                return
            # The other values of the batch can be encoded: one at a time.
            for index, value in values.items():
                yield from self._answer_values({index: value}, inputs, explain, on_error)
            return
        outputs = outputs_of_encoded(self.loaded, encoded)
        refuse_non_finite(outputs, lambda i: inputs[list(values)[i]].where)
        meanings = answers_of(self.loaded, encoded, outputs)
        for (index, value), output, meaning in zip(values.items(), outputs, meanings, strict=True):
            if explain and "note" not in meaning:
                meaning["explanation"] = explain_output(self.loaded, value, output)
            yield index, meaning

    def _encode(self, values: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
        return encode(self.preprocessing, values, range(len(values)), names.__getitem__)

    @cached_property
    def _no_answer(self) -> dict[str, Any]:
        """The keys of an answer without their values."""
        return dict.fromkeys(self.loaded.task.interpret(torch.zeros(1, self.loaded.task.out_features))[0])

    def _failed(self, error: DataError, one: Input) -> dict[str, Any]:
        # The answer contains the name of the input, but not the line of a malformed row in a table, for example.
        repeated = (None, one.where, one.name)
        messages = [p.message if p.where in repeated else f"{p.where}: {p.message}" for p in error.problems]
        return self._no_answer | {"error": "; ".join(messages)}


def load(run: str | Path, *, device: str | None = None, observe: Observer = ignore_events) -> Predictor:
    """Read the model of a run, once for any number of predictions.

    Args:
        run: Run directory, or model folder (an export in the format ``safetensors``).
        device: Device to compute on: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. None uses the run's
            ``train.device``, or ``auto`` if this machine does not have that device.
        observe: Function that is called with notes.

    Raises:
        UserError: The run is damaged, or the device does not exist.
    """
    folder = find_model(run)
    loaded = read_model(folder)
    if changed := plugin_changes(folder):
        observe(Note(changes_note(changed)))
    place(loaded.model, inference_device(device, _device_of_run(Path(run), folder), observe))
    return Predictor(folder, loaded)


def answers_of(loaded: LoadedModel, encoded: Sequence[Any], outputs: Tensor) -> list[dict[str, Any]]:
    """Return the task's interpretation of outputs (N, C) for encoded values.

    An answer to a value that is partly unknown contains ``unknown_fraction``. If a value is completely unknown, the
    outputs do not depend on it: its answer contains None and a ``note``.
    """
    answers = []
    for value, meaning in zip(encoded, loaded.task.interpret(outputs), strict=True):
        fraction = loaded.backbone.preprocessing.unknown_fraction(value)
        note = {"note": "no word of it is in the vocabulary of the model"} if fraction == 1 else {}
        unknown = {"unknown_fraction": fraction} if fraction else {}
        answers.append((dict.fromkeys(meaning) if note else meaning) | unknown | note)
    return answers


def _device_of_run(run: Path, folder: Path) -> str:
    """Return the ``train.device`` of a run; ``auto`` for a model folder without its run."""
    # `find_model` returns the path itself if it is a model folder.
    if folder == run:
        return "auto"
    return str(RunDirectory.open(run).config().get("train", {}).get("device", "auto"))


def _read(one: Input) -> Any:
    try:
        return one.read()
    except DataError as error:
        raise DataError.of([replace(p, where=p.where or one.where) for p in error.problems]) from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the input cannot be read: {reason}", where=one.where) from error


def _batched(inputs: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(inputs)
    while batch := list(itertools.islice(iterator, PREDICTION_BATCH)):
        yield batch


def _to_cpu(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()


def _has_row_per_value(output: Any, count: int) -> bool:
    """Return whether an output is a tensor (B, ...), or a pair of sequences (B, T, ...) and their mask (B, T)."""
    if isinstance(output, Tensor):
        return len(output) == count
    # A tuple may contain other things: distinct word vectors with their indices, or the values of several branches.
    if len(output) != 2 or output[1].dtype != torch.bool:
        return False
    return len(output[1]) == count and output[0].shape[:2] == output[1].shape


def _join(batches: Sequence[Tensor]) -> Tensor:
    """Return batches (B, ...) as one tensor (N, ...), padded with zeros to the largest size in each dimension."""
    shape = [max(sizes) for sizes in zip(*(batch.shape[1:] for batch in batches), strict=True)]
    joined = batches[0].new_zeros((sum(map(len, batches)), *shape))
    start = 0
    for batch in batches:
        region = (slice(start, start + len(batch)), *map(slice, batch.shape[1:]))
        joined[region] = batch
        start += len(batch)
    return joined
