"""The records of a round and of a request, which the stages of a round pass to each other."""
