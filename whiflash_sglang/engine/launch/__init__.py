"""Arguments of a launch: what WHIFLASH chooses and refuses, and processes that are watched from the start."""
