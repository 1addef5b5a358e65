"""The worker of a server: made of its settings, it serves rounds."""
