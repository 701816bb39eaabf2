"""The networks as they are trained: published parameter names, differentiable, whole utterances at once."""
