"""Tokenizers, vocabulary and word vectors of torchtext: the extra ``torchtext``, on torch 2.3."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import shutil
import ssl
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer import ConfigError, DataError, WeightsError, download, find_file
from transfer_text.interfaces import Tokenizer, Vectors, WordVectors
from transfer_text.vectors.vector_files import locate
from transfer_text.vectors.word_vectors import width_of

FASTTEXT_WIDTH = 300
CHARNGRAM_WIDTH = 100


def _torchtext(module: str) -> Any:
    importlib.import_module("torchtext").disable_torchtext_deprecation_warning()
    return importlib.import_module(f"torchtext.{module}")


class TorchtextTokenizer(Tokenizer):
    """torchtext's tokenizers and its vocabulary.

    The argument is a name of ``torchtext.data.get_tokenizer``: ``torchtext/basic_english``. The names ``spacy``,
    ``moses``, ``toktok``, ``revtok`` and ``subword`` need additional packages. The vocabulary is built by
    ``torchtext.vocab.build_vocab_from_iterator``.
    """

    def __init__(self, argument: str = "") -> None:
        names = ("torchtext/basic_english", "spacy", "moses", "toktok", "revtok", "subword")
        try:
            with contextlib.redirect_stdout(None):  # it prints an installation hint before it raises
                self._tokenize: Callable[[str], list[str]] = _torchtext("data.utils").get_tokenizer(argument)
        except ValueError as error:
            raise ConfigError(
                f"torchtext has no tokenizer {argument!r}", available=names, fix="use torchtext/basic_english"
            ) from error
        except (ImportError, AttributeError, OSError) as error:  # of the tokenizer's library or of its data
            raise ConfigError(
                f"torchtext's tokenizer {argument!r} cannot be loaded: {error}",
                fix=f"install the library of {argument}, or use torchtext/basic_english",
            ) from error

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of one text."""
        return self._tokenize(text)

    def vocabulary(self, texts: Iterable[Sequence[str]], *, min_frequency: int, max_size: int | None) -> list[str]:
        """Return the words of torchtext's ``Vocab``."""
        build = _torchtext("vocab").build_vocab_from_iterator
        words: list[str] = build(texts, min_freq=min_frequency, max_tokens=max_size).get_itos()
        return words


class TorchtextVectors(Vectors):
    """torchtext's word vectors.

    The argument is one of torchtext's names (``torchtext/glove.6B.100d``, ``torchtext/fasttext.en``,
    ``torchtext/charngram.100d``) or the path of a file that ``torchtext.vocab.Vectors`` reads. Files are searched for
    under ``$TRANSFER_DATA`` by their usual names; missing files are downloaded to that folder.
    """

    def __init__(self, argument: str = "") -> None:
        vocab = _torchtext("vocab")
        aliases = dict(vocab.pretrained_aliases)
        if match := re.fullmatch(r"fasttext\.([a-z_]+)(?:\.300d)?", argument):
            aliases[argument] = functools.partial(vocab.FastText, language=match[1])
        if not argument:
            fix = "write torchtext/glove.6B.100d, or a path after the slash"
            raise ConfigError("torchtext needs the name of vectors", available=tuple(aliases), fix=fix)
        self._argument = argument
        self._vocab = vocab
        self._class: Any = aliases[argument].func if argument in aliases else vocab.Vectors
        self._options: dict[str, str] = aliases[argument].keywords if argument in aliases else {}

    @property
    def width(self) -> int:
        """Width of the vectors, from the name or the first line of the file."""
        if self._class is self._vocab.FastText:
            return FASTTEXT_WIDTH
        if self._class is self._vocab.CharNGram:
            return CHARNGRAM_WIDTH
        return width_of(self._argument)

    def read(self, words: Sequence[str]) -> WordVectors:
        """Return torchtext's vectors of some words."""
        vectors = self._vectors
        matrix = np.zeros((len(words), vectors.dim), dtype=np.float32)
        for row, word in enumerate(words):
            matrix[row] = vectors[word].reshape(-1).numpy()
        if self._class is self._vocab.CharNGram:  # a word is source if any of its n-grams is
            return WordVectors(matrix, np.any(matrix, axis=1))
        return WordVectors(matrix, np.fromiter((word in vectors for word in words), dtype=np.bool_, count=len(words)))

    def words(self) -> list[str]:
        """Return the words of the file; none for character n-grams."""
        return [] if self._class is self._vocab.CharNGram else list(self._vectors.itos)

    @functools.cached_property
    def _vectors(self) -> Any:
        # torchtext finds the file in this folder, so it downloads nothing. It also writes a pickle there.
        with tempfile.TemporaryDirectory() as folder, _certificate_checks_restored():
            file = self._unpack_into(Path(folder))
            options = {"name": str(file)} if self._class is self._vocab.Vectors else self._options
            try:
                return self._class(**options, cache=folder)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise WeightsError(f"torchtext cannot read {self._argument!r}: {error}") from error

    def _unpack_into(self, folder: Path) -> Path:
        """Put the file into a folder, under the name that torchtext expects."""
        if self._class is self._vocab.CharNGram:
            return _unpack_ngrams(self._class.url, folder / str(self._class.name))
        if self._class is self._vocab.FastText:
            url = self._class.url_base.format(self._options["language"])
            file = folder / str(os.path.basename(url))
            source = locate(str(_fetch(url, file.name)))
        else:
            file = folder / (f"{self._argument}.txt" if self._class is self._vocab.GloVe else "vectors.txt")
            source = locate(self._argument)
        if isinstance(source.path, Path) and source.path.suffix in (".txt", ".vec"):
            file.symlink_to(source.path.resolve())
            return file
        with source.open() as (content, where, binary):
            if binary:
                raise WeightsError("torchtext does not read binary vectors", where=where, fix="remove torchtext/")
            with file.open("wb") as unpacked:
                shutil.copyfileobj(content, unpacked, 1 << 20)
        return file


def _unpack_ngrams(url: str, file: Path) -> Path:
    if (unpacked := find_file(f"vectors/{file.name}", file.name)) is not None:
        file.symlink_to(unpacked.resolve())
        return file
    archive = _fetch(url.replace("http://", "https://"), url.rpartition("/")[2])
    try:
        with tarfile.open(archive) as packed:
            member = packed.extractfile(file.name)
            assert member is not None
            with file.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise WeightsError(f"the archive does not contain {file.name}: {error}", where=str(archive)) from error
    return file


def _fetch(url: str, name: str) -> Path:
    try:
        return find_file(f"vectors/{name}", name) or download(url, f"vectors/{name}")
    except DataError as error:
        raise WeightsError.of(error.problems) from error


@contextlib.contextmanager
def _certificate_checks_restored() -> Iterator[None]:
    """Restore the check of TLS certificates, which torchtext's ``Vectors`` disable for the entire process."""
    before = ssl._create_default_https_context
    try:
        yield
    finally:
        ssl._create_default_https_context = before
