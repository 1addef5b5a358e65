"""`whiflash learn`: drafters of a bundle train on what was served, and make a new bundle if they got better."""
