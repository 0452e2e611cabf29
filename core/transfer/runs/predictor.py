"""A trained model that is read once and answers any number of calls."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transfer.config.train_settings import Precision
from transfer.data.batch import Batch
from transfer.data.encoding import encode
from transfer.errors import DataError, RunError, TransferError, UserError, unknown_name
from transfer.interfaces import Preprocessing
from transfer.models.forward import forward_batches
from transfer.models.model_json import DESCRIPTION
from transfer.models.precision import place, resolve_precision
from transfer.models.recorded_plugins import changes_note
from transfer.models.saved_model import LoadedModel, find_model, plugin_changes, read_model
from transfer.runs.answers import NOT_IN_EVERY_ANSWER, answers_of, complete_probabilities, flat
from transfer.runs.inference_device import inference_device
from transfer.runs.inputs import Input, frame_inputs, path_inputs, read_input, value_inputs
from transfer.runs.occlusion import explain_output, refuse_non_finite
from transfer.runs.stage_outputs import stage_outputs
from transfer.storage.run_directory import RunDirectory
from transfer.system.atomic_files import read_json
from transfer.system.iteration import batched, map_ahead
from transfer.training.events import Note, Observer, ignore_events

PREDICTION_BATCH = 64
"""Number of inputs that go through the model together."""

OnError = Literal["fail", "skip"]
"""``fail``: raise the error of the first input that cannot be read. ``skip``: answer the others."""


@dataclass(frozen=True)
class _Prepared:
    """A batch of inputs that are read and encoded.

    Args:
        inputs: Inputs of the batch.
        answers: Answers to the inputs without a value, by index.
        values: Raw values of the others, by index.
        encoded: Encoded values, in the order of ``values``.
        batch: Batch of the encoded values; None if there are none.
    """

    inputs: Sequence[Input]
    answers: dict[int, dict[str, Any]]
    values: dict[int, Any]
    encoded: Sequence[Any]
    batch: Batch | None


class Predictor:
    """A trained model on a device, with its preprocessing and the interpretation of its outputs.

    Args:
        folder: Model folder.
        loaded: Model that was read from the folder.
        precision: Precision of the forward pass; explanations are computed in fp32.
    """

    def __init__(self, folder: Path, loaded: LoadedModel, precision: Precision = "fp32") -> None:
        self.folder = folder
        self.loaded = loaded
        self.precision = precision

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
        self,
        values: Any,
        *,
        column: str | None = None,
        keep: Sequence[str] = (),
        explain: bool = False,
        on_error: OnError = "fail",
    ) -> list[dict[str, Any]]:
        """Predict a list of values, or the rows of a table; :func:`transfer.predict` describes them and the answers.

        Args:
            values: Strings, ``pathlib.Path`` objects of files or folders, or raw values (PIL images, arrays). With
                ``column``, a table: a data frame of pandas or polars, a dict of columns or a list of dicts.
            column: Name of the column of the table with the values.
            keep: Names of the columns of the table that the answers repeat.
            explain: Whether to compute the effect of each piece of a value on its score.
            on_error: Whether the first value that cannot be read raises its error (``fail``) or gets an answer with an
                ``error`` (``skip``).

        Raises:
            UserError: A value cannot be read, or the backbone cannot divide its inputs into pieces.
        """
        return list(self.answers(self.inputs(values, column, keep), explain=explain, on_error=on_error))

    def inputs(self, values: Any, column: str | None = None, keep: Sequence[str] = ()) -> Iterator[Input]:
        """Yield the inputs of a list of values, or of the rows of a table (:meth:`predict`).

        Raises:
            UserError: The table has no such column, or there are columns to keep and no table.
        """
        if column is not None and isinstance(values, str | os.PathLike):
            yield from path_inputs(Path(values).expanduser(), self.preprocessing, column, keep)
        elif column is not None:
            yield from frame_inputs(values, column, self.preprocessing, keep)
        elif keep:
            raise UserError(
                f"there is no column {keep[0]!r} to keep: the values are no table", fix="name the column of the values"
            )
        elif type(values).__name__ == "DataFrame":
            raise UserError(
                "the values are a table: expected the column to predict", fix="set column to one of its columns"
            )
        else:
            yield from value_inputs(values, self.preprocessing)

    def answers(
        self,
        inputs: Iterable[Input],
        *,
        explain: bool = False,
        on_error: OnError = "fail",
        all_probabilities: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Yield the answer to each input, in batches and in order.

        While the model computes a batch on a GPU, threads read and encode the next ones.

        Args:
            inputs: Inputs; they may be read lazily.
            explain: Whether to compute the effect of each piece of an input on its score.
            on_error: Whether the first input that cannot be read raises its error or gets an answer with an ``error``.
            all_probabilities: Whether the ``probabilities`` of a classification are those of all classes, in the order
                of the classes; otherwise those of the most probable ones.

        Raises:
            UserError: An input cannot be read, or the backbone cannot divide its inputs into pieces.
        """
        if explain and not self.preprocessing.explains:
            name = read_json(self.folder / DESCRIPTION, "there is no model here")["backbone"]["name"]
            fix = "predict without an explanation"
            raise RunError(f"backbone {name!r} cannot divide an input into pieces", where=str(self.folder), fix=fix)
        device = next(self.loaded.model.parameters()).device
        prepare = partial(self._prepare, on_error=on_error)
        waiting: deque[_Prepared] = deque()
        failures = list[Exception]()

        def batches() -> Iterator[Batch]:
            """Yield the batches with a value. Those without one only wait for their turn."""
            try:
                for prepared in map_ahead(
                    prepare, batched(inputs, PREDICTION_BATCH), self._reading_threads(device, explain)
                ):
                    waiting.append(prepared)
                    if prepared.batch is not None:
                        yield prepared.batch
            except TransferError as error:  # raised after the answers before it
                failures.append(error)

        # The occlusions of an explanation are computed in float32.
        precision = "fp32" if explain else self.precision
        computing: list[tuple[_Prepared, Tensor, torch.cuda.Event | None]] = []
        for _, outputs in forward_batches(self.loaded.model, batches(), device=device, precision=precision):
            while waiting[0].batch is None:
                computing.append((waiting.popleft(), outputs[:0].float().cpu(), None))
            computing.append((waiting.popleft(), *_copy_to_cpu(outputs)))
            # The answers of the last batch are made while the device computes this one. A CPU gains nothing by it.
            remaining = 1 if device.type == "cuda" else 0
            while len(computing) > remaining:
                yield from self._answer_batch(*computing.pop(0), explain, all_probabilities)
        for item in computing:
            yield from self._answer_batch(*item, explain, all_probabilities)
        for prepared in waiting:
            yield from self._answer_batch(prepared, torch.empty(0), None, explain, all_probabilities)
        if failures:
            raise failures[0]

    def _reading_threads(self, device: torch.device, explain: bool) -> int:
        """Return the number of batches that threads read and encode ahead; 0 reads them in this thread.

        Decoders of images use all cores within a batch, so two threads keep them busy while one waits for the disk.
        Preprocessing of texts may not be used by several threads, nor may one that explains while the next is read.
        """
        if device.type != "cuda" or explain:
            return 0
        return 1 if self.preprocessing.media_type.startswith("text/") else 2

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
        encoded = (
            self._encode([read_input(one) for one in batch], [one.where for one in batch])
            for batch in batched(value_inputs(values, self.preprocessing), PREDICTION_BATCH)
        )
        return stage_outputs(self.loaded.model, self.preprocessing, encoded, stage, where=str(self.folder))

    def _prepare(self, inputs: Sequence[Input], on_error: OnError) -> _Prepared:
        """Read and encode a batch of inputs. Those without a value get their answers."""
        answers: dict[int, dict[str, Any]] = {}
        values: dict[int, Any] = {}
        for index, one in enumerate(inputs):
            if one.is_blank:
                answers[index] = self._no_answer | {"note": "the input is blank"}
                continue
            try:
                values[index] = read_input(one)
            except DataError as error:
                if on_error == "fail":
                    raise
                answers[index] = self._failed(error, one)
        encoded: Sequence[Any]
        try:
            encoded = self._encode(list(values.values()), [inputs[index].where for index in values])
        except DataError:
            if on_error == "fail":
                raise
            encoded = []
            # The other values of the batch can be encoded: one at a time.
            for index in list(values):
                try:
                    encoded += self._encode([values[index]], [inputs[index].where])
                except DataError as error:
                    answers[index] = self._failed(error, inputs[index])
                    del values[index]
        batch = Batch.without_targets(self.preprocessing, encoded) if values else None
        return _Prepared(inputs, answers, values, encoded, batch)

    def _answer_batch(
        self,
        prepared: _Prepared,
        outputs: Tensor,
        copied: torch.cuda.Event | None,
        explain: bool,
        all_probabilities: bool,
    ) -> Iterator[dict[str, Any]]:
        """Yield the answers to a batch of inputs.

        Args:
            prepared: The batch.
            outputs: Outputs for its values (N, C), on the CPU.
            copied: Event after which the outputs are there; None if they are there already.
            explain: Whether to explain the outputs.
            all_probabilities: Whether the answers contain the probabilities of all classes.
        """
        inputs, values, results = prepared.inputs, prepared.values, prepared.answers
        if values:
            if copied is not None:
                copied.synchronize()
            refuse_non_finite(outputs, lambda i: inputs[list(values)[i]].where)
            meanings = answers_of(self.loaded, prepared.encoded, outputs)
            if all_probabilities:
                complete_probabilities(meanings, self.loaded, outputs)
            for (index, value), output, meaning in zip(values.items(), outputs, meanings, strict=True):
                if explain and "note" not in meaning:
                    meaning["explanation"] = explain_output(self.loaded, value, output)
                results[index] = meaning
        for index, one in enumerate(inputs):
            # A column may have the name of a part of the answer: `label` is the prediction, `input_label` the column.
            kept = {f"input_{name}" if name in self._reserved else name: value for name, value in one.kept.items()}
            yield {"input": one.name, **one.location, **kept, **results[index]}

    def _encode(self, values: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
        return encode(self.preprocessing, values, range(len(values)), names.__getitem__)

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """The keys of an answer that a column of a table cannot have."""
        return frozenset({"input", "file", "line", "row", "explanation", *NOT_IN_EVERY_ANSWER, *self._no_answer})

    def columns(self, keep: Sequence[str] = (), location: Sequence[str] = ()) -> list[str]:
        """Return the keys of all answers, with one for the probability of each class, in order.

        Args:
            keep: Names of the columns of a table that the answers repeat.
            location: Keys of the location of an input: ``line``; ``file`` and ``line``; or none.
        """
        kept = [f"input_{name}" if name in self._reserved else name for name in keep]
        empty = {**self._no_answer}
        if "probabilities" in empty:
            empty["probabilities"] = dict.fromkeys(self.classes)
        return ["input", *location, *kept, *flat(empty), *NOT_IN_EVERY_ANSWER]

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
    trained_on, precision = _settings_of_run(Path(run), folder)
    torch_device = inference_device(device, trained_on, observe)
    place(loaded.model, torch_device)
    return Predictor(folder, loaded, resolve_precision(precision, torch_device))


def _settings_of_run(run: Path, folder: Path) -> tuple[str, Precision | Literal["auto"]]:
    """Return ``train.device`` and ``train.precision`` of a run; auto and fp32 for a model folder without its run."""
    # `find_model` returns the path itself if it is a model folder.
    if folder == run:
        return "auto", "fp32"
    train = RunDirectory.open(run).config().get("train", {})
    return str(train.get("device", "auto")), train.get("precision", "fp32")


def _copy_to_cpu(outputs: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return outputs on the CPU, float32, and the event after which the copy is there (None: now)."""
    if not outputs.is_cuda:
        return outputs.float().cpu(), None
    copy = outputs.float().to("cpu", non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copy, event
