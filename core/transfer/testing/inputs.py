"""Contracts of the parts of preprocessing that read, show and explain single values."""

from __future__ import annotations

import io
import json
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transfer.errors import DataError
from transfer.interfaces import Occlusion, Preprocessing
from transfer.testing.backbones import require_as_declared, same, subject
from transfer.testing.cases import BATCH, Case, promise, require

UNREADABLE = (DataError, ValueError, OSError)
_IMAGE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def _sources(case: Case, folder: str) -> list[str]:
    """Return arguments of the command line for the values of a case: texts, or paths of images."""
    values = subject(case).values[:BATCH]
    if case.sources is not None:
        return list(case.sources)
    if all(isinstance(value, str) for value in values):
        return list(values)
    if all(isinstance(value, Image.Image) for value in values):
        paths = [Path(folder) / f"{index}.png" for index in range(len(values))]
        for value, path in zip(values, paths, strict=True):
            value.save(path)
        return [str(path) for path in paths]
    name = case.name.rpartition(":")[2]
    raise unittest.SkipTest(f"give arguments of the command line, contracts(sources={{{name!r}: [...]}})")


def _encoded(preprocessing: Preprocessing, value: Any) -> Any:
    return preprocessing.model_inputs(preprocessing.encode([value]))


@promise("interfaces.Preprocessing", "weights")
def read_returns_valid_inputs(case: Case) -> None:
    """``read`` returns a raw value for an argument of the command line, and raises DataError, ValueError or OSError."""
    built = subject(case)
    preprocessing = built.backbone.preprocessing
    with tempfile.TemporaryDirectory() as folder:
        for source in _sources(case, folder):
            inputs = _encoded(preprocessing, preprocessing.read(source))
            require_as_declared(built.backbone, built.backbone.eval()(inputs), batch=1)
    # Mistakes on the command line: a missing file, and an empty argument.
    for source in ("/nowhere/file.bin", ""):
        try:
            preprocessing.read(source)  # to a preprocessing of texts, it is a text
        except UNREADABLE:
            continue
        except Exception as error:
            require(False, f"read({source!r}) raises {type(error).__name__}: expected DataError, ValueError or OSError")


@promise("interfaces.Preprocessing", "weights")
def read_bytes_agrees_with_read(case: Case) -> None:
    """``read_bytes`` returns for the content of a file, or for a text in UTF-8, the same value as ``read``."""
    preprocessing = subject(case).backbone.preprocessing
    with tempfile.TemporaryDirectory() as folder:
        for source in _sources(case, folder):
            content = Path(source).read_bytes() if Path(source).is_file() else source.encode()
            one, other = preprocessing.read(source), preprocessing.read_bytes(content)
            equal = same(_encoded(preprocessing, one), _encoded(preprocessing, other))
            require(equal, f"read_bytes of the content of {source!r:.60} is another input than read")
    try:
        # Neither an image nor UTF-8.
        preprocessing.read_bytes(b"\xff\xfe\x00 no content")
    except UNREADABLE:
        pass
    except Exception as error:
        require(
            False,
            f"read_bytes of damaged content raises {type(error).__name__}: expected DataError, ValueError or OSError",
        )


@promise("interfaces.Preprocessing", "weights")
def lengths_agree_with_length(case: Case) -> None:
    """``lengths`` returns the ``length`` of each encoded value, int64 (N,), each 1 or more."""
    built = subject(case)
    preprocessing = built.backbone.preprocessing
    encoded = preprocessing.encode(built.values[:BATCH])
    lengths, expected = preprocessing.lengths(encoded), [preprocessing.length(value) for value in encoded]
    typed = isinstance(lengths, np.ndarray) and lengths.dtype == np.int64 and lengths.shape == (BATCH,)
    require(typed, f"lengths returns {lengths!r:.80}: expected an array of int64 {(BATCH,)}")
    require(lengths.tolist() == expected, f"lengths returns {lengths.tolist()}, and length returns {expected}")
    require(min(expected) >= 1, f"length returns {min(expected)}: expected 1 or more")


@promise("interfaces.Preprocessing", "weights")
def examples_are_rendered(case: Case) -> None:
    """``render_batch`` returns a PNG file, a text or None; ``thumbnail`` a JPEG or PNG file, or None."""
    built = subject(case)
    preprocessing, values = built.backbone.preprocessing, built.values[:BATCH]
    captions = [f"caption {index}" for index in range(BATCH)]
    rendered = preprocessing.render_batch(built.inputs, values, captions, {"first": [0, 1], "second": [2, 3]})
    good = rendered is None or isinstance(rendered, str) or _is_image(rendered, "PNG")
    require(good, f"render_batch returns {rendered!r:.60}: expected the bytes of a PNG file, a text or None")
    if isinstance(rendered, str):
        missing = [caption for caption in captions if caption not in rendered]
        require(not missing, f"the text of render_batch lacks {missing[:1]}")
    for value in values:
        small = preprocessing.thumbnail(value)
        good = small is None or _is_image(small, "PNG") or _is_image(small, "JPEG")
        require(good, f"thumbnail returns {small!r:.60}: expected the bytes of a JPEG or PNG file, or None")


def _is_image(content: object, kind: str) -> bool:
    try:
        return isinstance(content, bytes) and Image.open(io.BytesIO(content)).format == kind
    except OSError:
        return False


@promise("interfaces.Occlusion", "weights")
def occlusions_are_valid_inputs(case: Case) -> None:
    """``occlusions`` yields pieces in JSON, each with a valid value without it; joined, they are the complete text."""
    built = subject(case)
    preprocessing = built.backbone.preprocessing
    if not preprocessing.explains:
        return
    for value in built.values[:BATCH]:
        before = _encoded(preprocessing, value)
        occlusions = list(preprocessing.occlusions(value))
        require(occlusions, "occlusions yields nothing")
        require(all(isinstance(one, Occlusion) for one in occlusions), "occlusions yields no transfer.Occlusion")
        try:
            json.dumps([one.piece for one in occlusions])
        except TypeError as error:
            require(False, f"a piece is no JSON: {error}")
        if isinstance(value, str):
            text = "".join(str(one.piece) for one in occlusions)
            require(text == value, f"the pieces are {text!r:.60}: expected the complete text {value!r:.60}")
        rests = [one.rest for one in occlusions if one.rest is not None][:BATCH]
        for rest in rests:
            _encoded(preprocessing, rest)
        require(same(_encoded(preprocessing, value), before), "occlusions changes the value")
