"""Files and processes on this machine."""
