"""Two real questions to the embedded target: who drafted what, and how fast that was against plain decoding."""
