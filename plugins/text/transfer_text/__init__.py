"""Text for transfer: word vectors, vocabularies, TextCNN, and datasets of texts."""
