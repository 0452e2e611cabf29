"""The device of predict and evaluate."""

from __future__ import annotations

import pytest
import torch

from transfer import UserError
from transfer.runs.inference_device import inference_device
from transfer.training.events import Event


def test_requested_device_overrides_that_of_the_run() -> None:
    events: list[Event] = []
    assert inference_device("cpu", "cuda:99", events.append) == torch.device("cpu")
    assert events == []


def test_device_of_the_run_is_the_default() -> None:
    assert inference_device(None, "cpu", lambda _: None) == torch.device("cpu")


def test_missing_device_of_the_run_is_replaced_with_a_note() -> None:
    events: list[Event] = []
    device = inference_device(None, "cuda:99", events.append)
    assert device.type in ("cuda", "mps", "cpu")
    assert [event.text for event in events] == [  # type: ignore[union-attr]
        f"train.device of the run is cuda:99, which is not on this machine; using {device}"
    ]


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_requested_device_must_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}'") as caught:
        inference_device(name, "cpu", lambda _: None)
    assert caught.value.problems[0].where == "--device"
    assert "cpu" in caught.value.problems[0].available
