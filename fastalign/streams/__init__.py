"""Streams: what one kind of batch needs, its data, its collation and its loss; one file each.

To add one: subclass `Stream` in a file of its own, build it in `training/run.py`, and give the schedule its name.
"""
