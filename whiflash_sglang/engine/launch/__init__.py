"""Arguments of a launch: those that WHIFLASH fills in, those that it refuses, and the keys that it redacts."""
