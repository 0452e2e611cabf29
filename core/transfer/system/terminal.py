"""What a terminal may be shown: whatever a name or a text holds, it cannot command the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

# What a terminal takes for a command (C0 and C1 without tab and new line), what turns the direction of writing round
# (CVE-2021-42574), and halves of characters, which no encoding has.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text as a terminal may have it: control characters, which a name may hold, stand as their escapes."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class Console(RichConsole):
    """A console on which nothing that is shown can command the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what a renderable is made of, with the control characters in its text as their escapes."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
