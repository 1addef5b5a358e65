"""WhiFlash."""
