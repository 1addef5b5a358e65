"""EAGLE-3, DFlash and DSpark: their losses, and the runs that train them."""
