"""Training of the small model that the project ships."""
