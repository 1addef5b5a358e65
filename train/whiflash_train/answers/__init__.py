"""Training data of drafters: prompts, the target's answers to them, and the stores of these."""
