"""The device that rounds run on: captured passes, transfers, ranks and clocks."""
