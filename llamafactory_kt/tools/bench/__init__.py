"""``llamafactory-kt bench``: configurations on this machine, and endpoints."""
