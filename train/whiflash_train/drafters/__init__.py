"""Train EAGLE-3, DFlash and DSpark drafters: initial weights, losses and training runs."""
