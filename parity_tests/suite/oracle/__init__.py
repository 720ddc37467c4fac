"""The oracle: plain loops over members in float64 NumPy."""
