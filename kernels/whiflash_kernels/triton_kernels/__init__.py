"""Triton implementations, imported only when one is about to run."""
