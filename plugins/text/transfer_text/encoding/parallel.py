"""Many texts worked on by several processes at once; what comes out does not depend on how many.

A helper knows no vocabulary: it numbers the tokens of its share in the order in which it meets them, and this process
says what index each distinct token has. Helpers are started anew rather than forked, for threads may be running
(torch's, the tokenizers library's); they import no torch and are ready in a tenth of a second. Texts and numbers pass
through files: a pipe would want a thread in this process, which would wait for Python's lock at every turn.
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
from transfer_text.encoding.token_cache import InOrder, PieceTable
from transfer_text.encoding.token_finder import TokenFinder
from transfer_text.encoding.tokenization import TokenizerName, parted_by_blanks

logger = logging.getLogger(__name__)

SHARE_CHARACTERS = 4_000_000
"""The least that is worth a process: about half a second of work."""
MAX_PROCESSES = 4
OWN_SHARE = 1.8
"""Of this process, in helpers' shares: it need not be started, and knows pieces from texts before."""

Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""What all tokens of some texts in a row are, int32, and the number of each text's, int64."""

_TEXTS, _BYTES, _TOKENS, _NUMBERS, _COUNTS = "texts", "bytes", "tokens", "numbers", "counts"


class Numbering:
    """Numbers tokens in the order in which they are first met.

    Args:
        name: Of the tokenizer.
    """

    def __init__(self, name: TokenizerName) -> None:
        self.met = InOrder[str]()
        self.table = PieceTable(functools.partial(parted_by_blanks, name), self._number)
        self._finder = TokenFinder(name)

    def look_up(self, tokens: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the number of each token."""
        return np.fromiter(map(self.met.__getitem__, tokens), dtype=np.int32, count=len(tokens))

    def _number(self, pieces: Sequence[str]) -> Part:
        tokens, counts = self._finder.find(pieces)
        return self.look_up(tokens), counts


def numericalised(
    texts: Sequence[str],
    name: TokenizerName,
    numericalise: Callable[[Sequence[str]], Part],
    look_up: Callable[[Sequence[str]], npt.NDArray[np.int32]],
) -> Iterator[Part]:
    """Yield the numbers of the tokens of some texts, a part at a time, in their order.

    Args:
        texts: The texts; where they are many, helpers take a share each.
        name: Of the tokenizer.
        numericalise: Gives the numbers of the tokens of some texts.
        look_up: Gives the number of each of some tokens.

    Raises:
        ValueError: A text holds half a surrogate pair.
    """
    own, *shares = _shares(texts)
    with contextlib.ExitStack() as stack:
        helpers = [stack.enter_context(_helper(name, share)) for share in shares]
        yield from map(numericalise, text_blocks.blocks(own))
        for share, finish in zip(shares, helpers, strict=True):
            folder = finish()
            yield from map(numericalise, text_blocks.blocks(share)) if folder is None else _read(folder, look_up)


def processes() -> int:
    """Return how many may work at once: as many as there are cores, or as ``OMP_NUM_THREADS`` says, as for torch."""
    if not sys.executable or getattr(sys, "frozen", False):  # there is no Python to start
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, min(cores, MAX_PROCESSES))


def _shares(texts: Sequence[str]) -> list[Sequence[str]]:
    """Part texts into shares, one for each process: this one's, and those of the helpers, of like length."""
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    total = int(ends[-1]) if len(texts) else 0
    count = max(1, min(processes(), total // SHARE_CHARACTERS))
    inner = [total * (OWN_SHARE + share) / (OWN_SHARE + count - 1) for share in range(count - 1)]
    bounds = [0, *np.searchsorted(ends, inner).tolist(), len(texts)]
    return [texts[begin:end] for begin, end in itertools.pairwise(bounds)]


@contextlib.contextmanager
def _helper(name: TokenizerName, texts: Sequence[str]) -> Iterator[Callable[[], Path | None]]:
    """Start a helper; the function that is given waits for it and returns its folder, or None if it failed."""
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
            logger.debug("no helper is started: %s", error)
            yield lambda: None
            return
        stack.callback(process.wait)
        stack.callback(process.kill)  # of no effect if it has ended
        yield lambda: folder if process.wait() == 0 else None


def _write(folder: Path, texts: Sequence[str]) -> None:
    sizes: list[int] = []
    with (folder / _TEXTS).open("wb") as file:
        for block in text_blocks.blocks(texts):
            contents = [text.encode() for text in block]
            file.writelines(contents)
            sizes += map(len, contents)
    np.array(sizes, dtype=np.int64).tofile(folder / _BYTES)


def _help(name: TokenizerName, folder: Path) -> None:
    """Number the tokens of the texts that :func:`_write` wrote."""
    sizes = np.fromfile(folder / _BYTES, dtype=np.int64).tolist()
    numbering = Numbering(name)
    counts = []
    with (folder / _TEXTS).open("rb") as texts, (folder / _NUMBERS).open("wb") as file:
        for begin in range(0, len(sizes), text_blocks.BLOCK_TEXTS):
            block = [texts.read(size).decode() for size in sizes[begin : begin + text_blocks.BLOCK_TEXTS]]
            numbers, of_each = numbering.table.numericalise(block)
            numbers.tofile(file)
            counts.append(of_each)
    np.concatenate(counts).tofile(folder / _COUNTS)
    (folder / _TOKENS).write_bytes("".join(f"{token}\n" for token in numbering.met).encode())


def _read(folder: Path, look_up: Callable[[Sequence[str]], npt.NDArray[np.int32]]) -> Iterator[Part]:
    """Yield what :func:`_help` found, by this process's numbers."""
    numbers = look_up((folder / _TOKENS).read_bytes().decode().split("\n")[:-1])
    counts = np.fromfile(folder / _COUNTS, dtype=np.int64)
    with (folder / _NUMBERS).open("rb") as file:
        for begin in range(0, len(counts), text_blocks.BLOCK_TEXTS):
            of_each = counts[begin : begin + text_blocks.BLOCK_TEXTS]
            yield numbers[np.fromfile(file, dtype=np.int32, count=int(of_each.sum()))], of_each


if __name__ == "__main__":
    _help(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]  # a tokenizer's name, from _helper
