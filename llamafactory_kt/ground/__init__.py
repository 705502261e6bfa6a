"""What every room stands on: errors, the machine, memory, processes, files. Knows nothing of models or adapters."""
