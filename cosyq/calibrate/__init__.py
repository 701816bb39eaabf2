"""Quantization that knows what a model is given: sequences of its own, and what its layers see of them."""
