"""Checks of arguments, filed by subject, and the sentences that they raise."""
