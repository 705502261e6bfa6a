"""LLaMA-Factory's options and their parser: our keys, and what is checked when a chat asks for use_kt."""
