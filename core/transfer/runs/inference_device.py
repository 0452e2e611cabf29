"""The device that a trained model computes on."""

from __future__ import annotations

import torch

from transfer.errors import UserError
from transfer.system.devices import resolve_device
from transfer.training.events import Note, Observer


def inference_device(requested: str | None, trained_on: str, observe: Observer) -> torch.device:
    """Return the requested device, or the device of the run if none is requested.

    Args:
        requested: Name of a device (:func:`transfer.system.devices.resolve_device`). None selects the device of the
            run; if this machine does not have it, the best available device is used and a note is reported.
        trained_on: The ``train.device`` of the run.
        observe: Function that is called with the note.

    Raises:
        UserError: The requested device is unknown, or this machine does not have it.
    """
    if requested is not None:
        return resolve_device(requested, where="--device")
    try:
        return resolve_device(trained_on)
    except UserError:
        device = resolve_device("auto")
        observe(Note(f"train.device of the run is {trained_on}, which is not on this machine; using {device}"))
        return device
