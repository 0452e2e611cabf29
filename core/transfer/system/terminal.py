"""Safe terminal output: control characters in names and texts are escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console as RichConsole, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters (C0 and C1 without tab and new line), characters that change the writing direction
# (CVE-2021-42574), and surrogates, which no encoding can write.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with its control characters replaced by escape sequences."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class Console(RichConsole):
    """A rich console that escapes control characters in everything it prints."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable, with control characters in its text escaped."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
