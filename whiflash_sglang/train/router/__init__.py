"""The neural router: what it learns from replays, its run, and its pictures."""
