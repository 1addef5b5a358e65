"""Recorded conversations of agents, as a benchmark plays them. Neither SGLang nor torch is imported here."""
