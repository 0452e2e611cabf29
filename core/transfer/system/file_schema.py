"""Schemas of the JSON files of run, model, sweep and cache folders.

Such a folder may be damaged, edited by hand or come from somebody else: no field is read before it was checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from transfer.errors import Problem, RunError

MAX_PROBLEMS = 5
"""Maximum number of problems of one file in an error."""


class FileSchema(BaseModel):
    """Base of the schemas of JSON files: a value of another type is an error, and never converted.

    A plugin reads its own file with ``model_validate_json(text)``, which raises ValueError if the file is damaged.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


_Schema = TypeVar("_Schema", bound=FileSchema)


def checked(
    content: Mapping[str, Any],
    schema: type[_Schema],
    where: str,
    what: str = "the file is damaged",
    fix: str | None = None,
) -> _Schema:
    """Return plain data as an instance of its schema. Fields outside the schema are ignored.

    Args:
        content: Content of a file, which may have been edited or damaged.
        schema: Names, types and ranges of the fields.
        where: Path of the file, for errors.
        what: Message of the errors, in front of the field and its problem.
        fix: Instruction that solves the problem.

    Raises:
        RunError: A field is missing or has another type; the error contains all problems.
    """
    try:
        # As JSON, because in strict mode pydantic takes a dataclass or a tuple only from JSON. Paths that are not UTF-8
        # contain surrogates, which Python's JSON has and pydantic's refuses.
        return schema.model_validate_json(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    except ValidationError as error:
        problems = [
            Problem(f"{what}: {'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}", where, (), fix)
            for e in error.errors(include_url=False)
        ]
        raise RunError.of(problems[:MAX_PROBLEMS]) from error
