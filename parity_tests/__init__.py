"""The parity kit: one standard of equality, one oracle, and the suite that holds both packages to them."""
