"""Names of arms, the types of drafts and candidates, and the rates at which drafts are right."""
