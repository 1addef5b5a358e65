"""Commands that train drafters and put bundles together."""
