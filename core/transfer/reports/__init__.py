"""The report of a run: a self-contained HTML page, and its plots as SVG files."""
