"""Plain-torch implementations: the meaning of every op, and its CPU path."""
