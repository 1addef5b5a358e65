"""The device that rounds run on: captured passes, transfers, ranks, clocks, and what the host may read."""
