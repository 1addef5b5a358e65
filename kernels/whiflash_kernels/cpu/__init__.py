"""Kernels for CPUs, in C++: compiled once for the machine's processor where a compiler is, else torch's do."""
