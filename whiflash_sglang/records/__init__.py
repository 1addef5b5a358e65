"""A round and a request: what stages say to each other."""
