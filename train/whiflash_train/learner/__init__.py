"""`whiflash learn`: train a bundle's drafters on served requests, and write a new bundle if one became better."""
