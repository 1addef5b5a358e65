"""Connects SGLang's scheduler with the worker: lives of requests, memory, prices, stops, metrics."""
