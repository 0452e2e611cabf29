"""Write the packaged word vectors: a subset of a larger file.

python plugins/text/make_mini_vectors.py imdb.w2v.100d.txt.gz
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transfer_text.encoding.vocabulary import Vocabulary
from transfer_text.vectors.word_vectors import read_vectors

RESOURCES = Path(__file__).parent / "transfer_text" / "resources"
DECIMALS = 3
MAX_BYTES = 1_000_000


def main() -> None:
    """Write ``mini.vectors.txt.gz``: the words of the mini reviews, then frequent words up to the size limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="path of vectors in GloVe's text format, gzipped, frequent words first"
    )
    source = parser.parse_args().source

    with (RESOURCES / "mini_reviews.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    needed = set(Vocabulary.build(texts).tokens[2:])
    with gzip.open(source, "rt", encoding="utf-8") as file:
        words = [line.partition(" ")[0] for line in file]
    words.sort(
        key=lambda word: word not in needed
    )  # stable sort: words of the reviews first, each group in order of frequency
    matrix = read_vectors(str(source), words).matrix

    # Binary search for the largest number of words whose compressed file is within the limit.
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_pack(words[:middle], matrix)) <= MAX_BYTES else (low, middle - 1)
    packed = _pack(words[:low], matrix)
    (RESOURCES / "mini.vectors.txt.gz").write_bytes(packed)
    review_words = sum(word in needed for word in words[:low])
    print(f"{review_words} words of the reviews and {low - review_words} other words in {len(packed):,} bytes")  # noqa: T201


def _pack(words: list[str], matrix: npt.NDArray[np.float32]) -> bytes:
    packed = io.BytesIO()
    # Without a modification time and a file name, the output depends only on the input.
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
        for word, vector in zip(words, matrix, strict=False):
            numbers = (f"{number:.{DECIMALS}f}" for number in vector)
            file.write(f"{word} {' '.join(numbers)}\n".encode())
    return packed.getvalue()


if __name__ == "__main__":
    main()
