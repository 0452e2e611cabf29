"""Trained models over HTTP: a JSON API with OpenAPI, and a page for a person. Needs the extra ``serve``."""
