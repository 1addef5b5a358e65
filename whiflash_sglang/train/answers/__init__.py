"""What drafters learn from: prompts, the target's answers to them, and where these are kept."""
