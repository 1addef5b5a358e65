"""WhiFlash for SGLang: token-level switching between speculative drafters.

Method: WhiFlash, arXiv 2606.07710. The package imports SGLang only in `engine/`.
"""

__version__ = "0.1.0"
