"""Input transformations in front of a model."""
