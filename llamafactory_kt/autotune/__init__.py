"""Which engine computes the experts, with how many threads: candidates, measured once per machine and shape."""
