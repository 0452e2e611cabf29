"""Operations of a training step of TextCNN and BiLSTM with 64 texts, as a GPU would run them, counted on the CPU.

On a GPU, small models wait for the start of kernels, and each operation starts at least one. The number of operations
does not depend on the device: the script counts those that reach torch's dispatcher, without views and allocations, in
a step of the engine, from the forward pass to the optimizer. The models take the path of a GPU. Calls of the LSTM are
counted separately: on a GPU, each is one call of cuDNN, which starts kernels of its own.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from common import print_table
from torch.utils._python_dispatch import TorchDispatchMode

from transfer.config.check import load_config
from transfer.training.build import build
from transfer.training.engine import Trainer
from transfer.training.events import ignore_events
from transfer_text.models import bilstm, embedding, textcnn

BATCH = 64
MODELS = {
    "TextCNN, two channels": {"name": "textcnn", "vectors": "mini"},
    "TextCNN, random vectors": {"name": "textcnn"},
    "BiLSTM, frozen vectors": {"name": "bilstm", "vectors": "mini"},
    "BiLSTM, random vectors": {"name": "bilstm"},
}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
"""Operations without a kernel, in addition to views."""
LSTM = {"mkldnn_rnn_layer": "LSTM, forward", "mkldnn_rnn_layer_backward": "LSTM, backward"}
PROFILER = {"_record_function_enter_new", "_record_function_exit"}


class OperationCounter(TorchDispatchMode):
    """Counter of the operations that start kernels, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and run it."""
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        name = func.overloadpacket.__name__
        # The wrapper of the CPU's LSTM stacks its final states, which a GPU does not do.
        if not is_view and name not in FREE | PROFILER | {"stack"}:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(backbone: dict[str, Any], *, verbose: bool) -> dict[str, str]:
    """Return the number of operations of one training step, and that of the calls of the LSTM, which it excludes."""
    config = {
        "seed": 0,
        "data": {"name": "mini_reviews"},
        "backbone": backbone,
        "head": {"name": "linear", "dropout": 0.5},
        "train": {"batch_size": BATCH, "device": "cpu", "cache": "off", "phases": [{"epochs": 1}]},
    }
    experiment = build(load_config(config), ignore_events).experiment
    trainer = Trainer(experiment)
    trainer.prepare_phase(experiment.phases[0])
    first, second, *_ = experiment.train.epoch(0)
    trainer.train_step([first], examples=BATCH)  # the first step creates the state of the optimizer
    with OperationCounter() as counter:
        trainer.train_step([second], examples=BATCH)
    if verbose:
        print(counter.counts)
    calls = {label: str(counter.counts.pop(name, 0)) for name, label in LSTM.items()}
    return {"operations": str(counter.counts.total()), **calls}


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", action="store_true", help="print the number of operations by name")
    arguments = parser.parse_args()
    for module in (embedding, textcnn, bilstm):
        module.use_batch_vocabulary = lambda indices: False  # as on a GPU
    print(f"CPU, torch {torch.__version__}, {BATCH} texts per step")
    print_table([{"": name, **count(backbone, verbose=arguments.verbose)} for name, backbone in MODELS.items()])


if __name__ == "__main__":
    main()
