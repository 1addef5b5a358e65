"""Names of arms, what a draft is, and how often one is right."""
