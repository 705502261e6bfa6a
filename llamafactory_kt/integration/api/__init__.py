"""LLaMA-Factory's OpenAI-style API."""
