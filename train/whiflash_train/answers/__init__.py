"""Training data of drafters: prompts, the target's answers, and stores of answers with features."""
