"""Artifacts on the Hub: what of a folder goes there, how it is described, and how it comes back."""
