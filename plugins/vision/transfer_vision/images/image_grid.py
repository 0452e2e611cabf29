"""A grid of images with captions and headings as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
CELL_PIXELS = 128
"""Smaller images are enlarged to about this width by an integer factor, so that every pixel is visible."""
GAP_PIXELS = 6
FONT_PIXELS = 12
LINE_PIXELS = 15
HEADING_PIXELS = 22
PAPER, INK = "white", "black"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_grid(images: Sequence[Image.Image], captions: Sequence[str], groups: Mapping[str, Sequence[int]]) -> bytes:
    """Draw images of equal size, each with its caption below it, one group after the other.

    Args:
        images: RGB images.
        captions: One or more lines for each image. A line that is wider than the image is truncated.
        groups: Indices of the images under each heading; a row contains at most :data:`COLUMNS` of them.

    Returns:
        The bytes of a PNG file; equal arguments give equal bytes.
    """
    width, height = images[0].size
    scale = max(1, CELL_PIXELS // width)
    size = (width * scale, height * scale)
    lines = max(caption.count("\n") + 1 for caption in captions)
    across, down = size[0] + GAP_PIXELS, size[1] + lines * LINE_PIXELS + GAP_PIXELS
    columns = min(COLUMNS, max(map(len, groups.values()), default=1)) or 1
    rows = sum(-(-len(indices) // columns) for indices in groups.values())
    sheet = Image.new(
        "RGB", (GAP_PIXELS + columns * across, GAP_PIXELS + len(groups) * HEADING_PIXELS + rows * down), PAPER
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PIXELS)
    top = GAP_PIXELS
    for heading, indices in groups.items():
        pen.text((GAP_PIXELS, top), _truncated(heading, sheet.width - 2 * GAP_PIXELS, font), INK, font)
        top += HEADING_PIXELS
        for row in _rows(indices, columns):
            for column, index in enumerate(row):
                left = GAP_PIXELS + column * across
                sheet.paste(images[index].resize(size, Image.Resampling.NEAREST), (left, top))
                for number, line in enumerate(captions[index].split("\n")):
                    y = top + size[1] + number * LINE_PIXELS
                    pen.text((left, y), _truncated(line, size[0], font), INK, font)
            top += down
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _rows(indices: Sequence[int], columns: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), columns):
        yield indices[start : start + columns]


def _truncated(line: str, width: int, font: Font) -> str:
    """Truncate a line to a width in pixels, and mark the cut with dots.

    Pillow's default font draws the same box for every character outside ASCII, so these are escaped.
    """
    line = line.encode("ascii", "backslashreplace").decode()
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
