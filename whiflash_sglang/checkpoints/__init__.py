"""Bundles and draft checkpoints: where their files are, what they must hold, the targets they fit."""
