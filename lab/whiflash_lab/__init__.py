"""Measuring: benchmarks of servers, recorded conversations, judges of drafters. Serving imports none of it."""

__version__ = "0.1.0"
