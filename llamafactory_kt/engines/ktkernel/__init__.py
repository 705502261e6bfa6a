"""kt-kernel's engines. The only code that knows kt-kernel."""
