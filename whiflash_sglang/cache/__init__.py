"""State that switching between drafters keeps: watermarks, backlog rings, known tokens, draft KV."""
