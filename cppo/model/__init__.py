"""Models: how a family is called on a packed stream, and all that knows transformers."""
