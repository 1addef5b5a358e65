"""Spans of an agent's output: the hints of a request about them, and the tracker of the open span.

Pure Python on bytes and token ids: neither SGLang nor torch.
"""
