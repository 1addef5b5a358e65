"""Torch replacements for the Triton-only helpers of SGLang's speculation."""
import torch
def install_seams(): pass
def extend_cache_locs(**kw): raise NotImplementedError
