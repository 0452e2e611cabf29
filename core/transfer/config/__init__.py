"""Configuration: YAML to a checked RunConfig."""
