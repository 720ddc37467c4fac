"""The suite of this repository, which uses the parity kit; it is not installed."""
