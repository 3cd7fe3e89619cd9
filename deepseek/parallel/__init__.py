"""Who owns which slice of a model."""
