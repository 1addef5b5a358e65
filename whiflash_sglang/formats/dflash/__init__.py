"""DFlash and its family: one block in one pass."""
