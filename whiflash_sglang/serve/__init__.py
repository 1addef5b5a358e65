"""The worker of a server: it is built from the settings and runs prefills and rounds."""
