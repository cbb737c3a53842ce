"""Needs of a run on accelerators that are not here: memory, time and money."""
