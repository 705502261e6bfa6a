"""How LLaMA-Factory loads a model: with KT experts, if a chat asks for use_kt."""
