"""Export, model card and serving."""
