"""What a server keeps for learning from its traffic, and the versions of drafters that it may be given."""
