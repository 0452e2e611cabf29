"""Cached features of the frozen prefix."""
