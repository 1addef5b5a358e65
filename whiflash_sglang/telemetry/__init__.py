"""Counts of a running worker, its traces and samples, and the statistics of measurements. Imports no SGLang."""
