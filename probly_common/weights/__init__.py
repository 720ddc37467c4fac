"""Names, options and files of weights."""
