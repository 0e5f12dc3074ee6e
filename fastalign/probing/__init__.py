"""Probing: how well the states of a layer find translations."""
