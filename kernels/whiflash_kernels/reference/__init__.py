"""Attention in plain torch: drafters' attention, and whole batches over paged KV."""
