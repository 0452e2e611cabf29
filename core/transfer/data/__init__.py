"""Splits, tables, batches and loading."""
