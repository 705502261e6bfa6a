"""LLaMA-Factory's pages, ``webchat`` and LlamaBoard (``webui``)."""
