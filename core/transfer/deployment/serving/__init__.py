"""Serving of trained models over HTTP: a JSON API with OpenAPI, and a demo page. Needs the extra ``serve``."""
