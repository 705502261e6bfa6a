"""``python -m llamafactory_kt``: the same as the command ``llamafactory-kt``."""

from .cli import main

if __name__ == "__main__":
    main()
