"""Commands that train, and put bundles together."""
