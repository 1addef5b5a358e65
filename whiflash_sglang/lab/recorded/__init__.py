"""Recorded conversations of agents as a benchmark: what training-free arms would have drafted of what was written.

No target runs: the recorded assistant messages are the text. Neither SGLang nor torch is imported here.
"""
