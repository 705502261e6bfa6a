"""Products with bfloat16 weights on the CPU: layouts, and the libraries that compute them."""
