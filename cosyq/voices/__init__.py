"""A voice as a value: what the models need to speak like someone."""
