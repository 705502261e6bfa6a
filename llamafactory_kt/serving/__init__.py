"""Serving with SGLang and kt-kernel: the server's command line, its adapter, its process. Nothing here knows LLaMA-Factory."""
