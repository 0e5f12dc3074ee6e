"""Objectives on pooled states, one file each. To add one: a function of states and settings that returns a scalar."""
