"""The examples and the README run, and show what they say they show."""
