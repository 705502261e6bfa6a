"""What the commands of ``llamafactory-kt`` do."""
