"""A grid of pictures with captions, in groups with headings: one PNG file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
CELL_PIXELS = 128
"""Smaller pictures are enlarged to about this size by whole steps, so that every pixel is seen."""
GAP_PIXELS = 6
FONT_PIXELS = 12
LINE_PIXELS = 15
HEADING_PIXELS = 22
PAPER, INK = "white", "black"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_grid(pictures: Sequence[Image.Image], captions: Sequence[str], groups: Mapping[str, Sequence[int]]) -> bytes:
    """Draw pictures of one size, each over its caption, group after group.

    Args:
        pictures: RGB.
        captions: One or more lines for each picture; a line that is wider than the picture is cut.
        groups: For each heading the places of the pictures under it; at most :data:`COLUMNS` stand in a row.

    Returns:
        The bytes of a PNG file, the same ones every time.
    """
    width, height = pictures[0].size
    scale = max(1, CELL_PIXELS // width)
    size = (width * scale, height * scale)
    lines = max(caption.count("\n") + 1 for caption in captions)
    across, down = size[0] + GAP_PIXELS, size[1] + lines * LINE_PIXELS + GAP_PIXELS
    columns = min(COLUMNS, max(map(len, groups.values()), default=1)) or 1
    rows = sum(-(-len(places) // columns) for places in groups.values())
    sheet = Image.new(
        "RGB", (GAP_PIXELS + columns * across, GAP_PIXELS + len(groups) * HEADING_PIXELS + rows * down), PAPER
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PIXELS)
    top = GAP_PIXELS
    for heading, places in groups.items():
        pen.text((GAP_PIXELS, top), _fitting(heading, sheet.width - 2 * GAP_PIXELS, font), INK, font)
        top += HEADING_PIXELS
        for row in _rows(places, columns):
            for column, place in enumerate(row):
                left = GAP_PIXELS + column * across
                sheet.paste(pictures[place].resize(size, Image.Resampling.NEAREST), (left, top))
                for number, line in enumerate(captions[place].split("\n")):
                    y = top + size[1] + number * LINE_PIXELS
                    pen.text((left, y), _fitting(line, size[0], font), INK, font)
            top += down
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _rows(places: Sequence[int], columns: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), columns):
        yield places[start : start + columns]


def _fitting(line: str, width: int, font: Font) -> str:
    """Return a line that is no wider than so many pixels, with dots where it was cut.

    Pillow's own font draws the same box for everything outside ASCII, so that is written as escapes.
    """
    line = line.encode("ascii", "backslashreplace").decode()
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
