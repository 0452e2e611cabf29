"""Splits, tables, batches and the data loader."""
