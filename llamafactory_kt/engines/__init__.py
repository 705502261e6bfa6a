"""Engines: each computes one layer's routed experts on the CPU, and says by itself all that others ask about it."""
