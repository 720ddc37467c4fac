"""Bad input: the same error with the same sentence from both packages. One table for each file of checks."""
