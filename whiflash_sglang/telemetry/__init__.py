"""Counts of a running worker, traces of its requests, and samples of their tokens on disk. Imports no SGLang."""
