"""Tabular data, an MLP backbone and quantile regression, as plugins for transfer."""
