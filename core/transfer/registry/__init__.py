"""Entry points, plugin listing, scaffold of a new plugin."""
