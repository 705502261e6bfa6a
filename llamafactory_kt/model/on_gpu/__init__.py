"""With a GPU: what crosses between it and the experts on the CPU, and what it computes meanwhile."""
