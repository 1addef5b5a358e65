"""Names of arms, types of drafts and candidates, rates at which drafts are right, and rounds of a replay."""
