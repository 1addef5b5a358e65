"""Samples that a server keeps for learning from its traffic, and versions of its drafters."""
