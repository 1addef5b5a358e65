"""DFlash and related formats, which draft a block of tokens in one pass."""
