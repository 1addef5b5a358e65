"""Drafters and routers replayed over answers: what they accept, what that is worth, and thresholds."""
