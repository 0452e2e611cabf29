"""Text backbones."""
