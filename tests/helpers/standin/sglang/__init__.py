"""A stand-in for sglang-kt in tests: the option names of the real one, and a server that echoes."""
