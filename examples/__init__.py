"""Programs to run and to copy from, such as `python -m examples.two_moons`."""
