"""Command-line flags, and the settings of a worker that they resolve to."""
