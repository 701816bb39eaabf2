"""The published checkpoint: its files in, named float tensors in our own names out.

Everything is checked here, once: what later levels get is complete, of the right shape and finite.
"""
