"""The base model: loading it with its adapter, leaving it early, and sentence vectors from its middle layers."""
