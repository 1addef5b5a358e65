"""Stored answers walked again, drafter by drafter: the router learns from it and judging counts it."""
