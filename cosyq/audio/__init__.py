"""Samples to files and streams."""
