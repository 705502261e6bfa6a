"""What the routers of a running model have chosen: tables and pictures."""
