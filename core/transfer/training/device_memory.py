"""Peak memory and out-of-memory errors."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from transfer.errors import MemoryRanOut


@contextmanager
def explain_out_of_memory(examples: int) -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if isinstance(error, torch.cuda.OutOfMemoryError) or should_reduce_batch_size(error):
            raise MemoryRanOut(
                f"memory ran out on a batch of {examples} examples",
                fix="set a smaller train.batch_size (or train.evaluation_batch_size, or train.max_tokens), or auto",
            ) from error
        raise


def peak_memory_bytes() -> int:
    """Return the most memory in use so far: the device's on a GPU, the process's on the CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
