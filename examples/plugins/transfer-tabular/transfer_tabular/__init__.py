"""Rows of tables, an MLP over them, and quantile regression, as plugins for transfer."""
