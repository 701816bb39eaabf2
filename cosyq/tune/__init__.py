"""Formats for a budget: what each module's costs is measured, and the cheapest choice of all becomes a recipe."""
