"""Texts that are empty after cleaning."""

from __future__ import annotations

import html
import re
from typing import Literal

from transfer_text.encoding.tokenization import TAGS

BadTexts = Literal["error", "skip"]

_TAG = re.compile(rf"</?(?:{TAGS})\s*/?>", re.ASCII | re.IGNORECASE)


def is_empty(text: str) -> bool:
    """Return whether only whitespace, invisible characters, markup and entities for blanks are in a text."""
    text = text.strip()
    # Almost every text starts with a visible character that is no markup.
    if text and text[0].isprintable() and text[0] not in "<&":
        return False
    return not any(c.isprintable() and not c.isspace() for c in html.unescape(_TAG.sub("", text)))
