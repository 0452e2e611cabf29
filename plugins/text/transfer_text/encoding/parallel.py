"""Encode texts in parallel; the result does not depend on the number of processes.

A worker has no vocabulary. It assigns local ids to tokens in first-seen order, and the main process maps each distinct
token to its index. Workers are started with a new interpreter, not forked, because threads may be running (those of
torch and of the tokenizers library). They do not import torch and start in a tenth of a second. Texts and ids are
exchanged through files: a pipe would need a reader thread in the main process, which would compete for the GIL.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfer_text.encoding import text_blocks
from transfer_text.encoding.token_cache import FirstSeenIndex, PieceTable
from transfer_text.encoding.token_finder import TokenFinder
from transfer_text.encoding.tokenization import TokenizerName, with_safe_whitespace

logger = logging.getLogger(__name__)

MIN_CHUNK_CHARACTERS = 4_000_000
"""Smallest chunk of texts that justifies a worker: about half a second of work."""
MAX_PROCESSES = 4
MAIN_PROCESS_WEIGHT = 1.8
"""Size of the main process's chunk relative to a worker's: it has no start-up time, and its piece table is warm."""

EncodedBlock = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Concatenated token ids of a block of texts, int32 (T,), and the number of tokens of each text, int64 (N,)."""

_TEXTS, _BYTES, _TOKENS, _IDS, _COUNTS = "texts", "bytes", "tokens", "ids", "counts"


class LocalIds:
    """Token ids in first-seen order, for a process without a vocabulary.

    Args:
        name: Name of the tokenizer.
    """

    def __init__(self, name: TokenizerName) -> None:
        self.tokens = FirstSeenIndex[str]()
        self.table = PieceTable(functools.partial(with_safe_whitespace, name), self._tokenize)
        self._finder = TokenFinder(name)

    def look_up(self, tokens: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the local id of each token, int32."""
        return np.fromiter(map(self.tokens.__getitem__, tokens), dtype=np.int32, count=len(tokens))

    def _tokenize(self, pieces: Sequence[str]) -> EncodedBlock:
        tokens, counts = self._finder.find(pieces)
        return self.look_up(tokens), counts


def encode_in_parallel(
    texts: Sequence[str],
    name: TokenizerName,
    encode: Callable[[Sequence[str]], EncodedBlock],
    look_up: Callable[[Sequence[str]], npt.NDArray[np.int32]],
) -> Iterator[EncodedBlock]:
    """Yield the token ids of texts, block by block, in the order of the texts.

    Args:
        texts: The texts. If there are many, each worker process encodes one chunk of them.
        name: Name of the tokenizer.
        encode: Function that encodes a list of texts in this process.
        look_up: Function that returns the id of each of some tokens.

    Raises:
        ValueError: A text contains a lone surrogate.
    """
    # The workers run while this process encodes the first chunk, which is therefore the largest.
    own_chunk, *worker_chunks = _chunks(texts)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(name, chunk)) for chunk in worker_chunks]
        yield from map(encode, text_blocks.blocks(own_chunk))
        for chunk, wait in zip(worker_chunks, workers, strict=True):
            folder = wait()
            # If a worker failed, its chunk is encoded here.
            yield from map(encode, text_blocks.blocks(chunk)) if folder is None else _read(folder, look_up)


def max_processes() -> int:
    """Return the number of processes to use: the number of cores, limited by ``OMP_NUM_THREADS`` as torch is."""
    if not sys.executable or getattr(sys, "frozen", False):  # there is no interpreter to start
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, min(cores, MAX_PROCESSES))


def _chunks(texts: Sequence[str]) -> list[Sequence[str]]:
    """Split texts into one chunk for this process and equally long chunks (in characters) for the workers."""
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    total = int(ends[-1]) if len(texts) else 0
    count = max(1, min(max_processes(), total // MIN_CHUNK_CHARACTERS))
    # Ends of all chunks but the last, in characters: the first one weighs MAIN_PROCESS_WEIGHT, the others 1.
    inner = [total * (MAIN_PROCESS_WEIGHT + i) / (MAIN_PROCESS_WEIGHT + count - 1) for i in range(count - 1)]
    bounds = [0, *np.searchsorted(ends, inner).tolist(), len(texts)]
    return [texts[start:end] for start, end in itertools.pairwise(bounds)]


@contextlib.contextmanager
def _worker(name: TokenizerName, texts: Sequence[str]) -> Iterator[Callable[[], Path | None]]:
    """Start a worker. Yield a function that waits for it and returns its folder, or None if the worker failed."""
    # -P: a file in the working folder must not shadow a module; PYTHONPATH has the path of this process.
    command = [sys.executable, "-P", "-m", __name__, name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transfer-")))
            _write(folder, texts)
            null = subprocess.DEVNULL
            process = subprocess.Popen(  # noqa: S603  # this very interpreter and module
                [*command, str(folder)], env=environment, stdin=null, stdout=null, stderr=null
            )
        except OSError as error:
            logger.debug("cannot start a worker process: %s", error)
            yield lambda: None
            return
        stack.callback(process.wait)
        stack.callback(process.kill)  # no effect if it has ended
        yield lambda: folder if process.wait() == 0 else None


def _write(folder: Path, texts: Sequence[str]) -> None:
    sizes: list[int] = []
    with (folder / _TEXTS).open("wb") as file:
        for block in text_blocks.blocks(texts):
            contents = [text.encode() for text in block]
            file.writelines(contents)
            sizes += map(len, contents)
    np.array(sizes, dtype=np.int64).tofile(folder / _BYTES)


def _run_worker(name: TokenizerName, folder: Path) -> None:
    """Assign local ids to the tokens of the texts that :func:`_write` wrote. Runs in a worker process."""
    sizes = np.fromfile(folder / _BYTES, dtype=np.int64).tolist()
    local_ids = LocalIds(name)
    counts = []
    with (folder / _TEXTS).open("rb") as texts, (folder / _IDS).open("wb") as file:
        for start in range(0, len(sizes), text_blocks.BLOCK_TEXTS):
            block = [texts.read(size).decode() for size in sizes[start : start + text_blocks.BLOCK_TEXTS]]
            ids, lengths = local_ids.table.encode(block)
            ids.tofile(file)
            counts.append(lengths)
    np.concatenate(counts).tofile(folder / _COUNTS)
    # One token per line: no tokenizer returns a token with a line break.
    (folder / _TOKENS).write_bytes("".join(f"{token}\n" for token in local_ids.tokens).encode())


def _read(folder: Path, look_up: Callable[[Sequence[str]], npt.NDArray[np.int32]]) -> Iterator[EncodedBlock]:
    """Yield the result of :func:`_run_worker`, with local ids mapped to the ids of this process."""
    ids = look_up((folder / _TOKENS).read_bytes().decode().split("\n")[:-1])
    counts = np.fromfile(folder / _COUNTS, dtype=np.int64)
    with (folder / _IDS).open("rb") as file:
        for start in range(0, len(counts), text_blocks.BLOCK_TEXTS):
            lengths = counts[start : start + text_blocks.BLOCK_TEXTS]
            yield ids[np.fromfile(file, dtype=np.int32, count=int(lengths.sum()))], lengths


if __name__ == "__main__":
    _run_worker(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]  # the name of a tokenizer, from _worker
