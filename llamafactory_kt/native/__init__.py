"""The native kernels: C++ behind a plain C interface (``src/kt_native.h``), and their calls."""
