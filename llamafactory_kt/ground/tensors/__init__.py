"""Files of tensors: read by name and in pieces, written whole."""
