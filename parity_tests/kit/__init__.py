"""The parity kit: pairs weights and layers, runs, judges, finds the first layer that differs and why, and reports."""
