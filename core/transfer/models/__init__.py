"""Backbone and head as one chain of stages; saved models."""
