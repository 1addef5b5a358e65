"""`whiflash learn`: drafters that serve go on training on what was served, and become a version if they got better."""
