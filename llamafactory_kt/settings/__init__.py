"""The ``kt_*`` keys: defaults, types, and every rule about them."""
