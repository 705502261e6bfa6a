"""Errors, the machine, memory, processes and files: what every other room uses. Knows nothing of models or adapters."""
