"""Streams: what one kind of batch needs, its data, its collation and its loss; one file each.

To add one: docs/extending.md.
"""
