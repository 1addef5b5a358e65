"""Between SGLang's scheduler and the worker: requests' lives, memory, prices, stops, metrics."""
