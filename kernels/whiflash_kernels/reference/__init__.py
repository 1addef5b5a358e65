"""Attention in plain torch: of drafters, and of whole batches over paged KV."""
