"""The stages of a round: planning, catch-up, drafting, commit and learning; quarantine of faulty drafters."""
