"""The target's forward pass: layouts of a verification by attention backend, graphs, features, sampling, ranks."""
