"""State that outlasts a switch of drafters: watermarks, backlog rings, known tokens, draft KV."""
