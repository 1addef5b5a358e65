"""A round, stage by stage: what is planned, sent, verified, learned, and what a request's beginning and end change."""
