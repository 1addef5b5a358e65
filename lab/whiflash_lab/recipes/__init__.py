"""Launches that others published, judged by their flags."""
