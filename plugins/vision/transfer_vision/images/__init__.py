"""Image files: archives, decoding, validation."""
