"""A running worker as its operators see it: series, the state route, log lines."""
