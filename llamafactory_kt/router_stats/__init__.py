"""Router statistics of a running model: tables and plots."""
