"""Requests and answers: what they carry, what is read from them, and routes of our own."""
