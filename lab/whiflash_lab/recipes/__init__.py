"""Judges published launches of SGLang by their flags: whether WHIFLASH would start with them."""
