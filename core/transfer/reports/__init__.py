"""The report of a run: one page of HTML that needs nothing beside itself, and its plots as SVG files."""
