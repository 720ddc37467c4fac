"""The parity kit: compare, its causes, reports and commands."""
