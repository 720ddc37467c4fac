"""Weights and options in files and between the frameworks."""
