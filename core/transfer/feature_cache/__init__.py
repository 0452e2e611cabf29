"""Stored features of the frozen prefix."""
