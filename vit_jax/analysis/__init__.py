"""The cost of a model, and views of what it has learned."""
