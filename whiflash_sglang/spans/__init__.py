"""Spans of an agent's output: what a request says about them, and which one is open now.

Pure Python on bytes and token ids: neither SGLang nor torch.
"""
