"""The process that serves HTTP: it reads WHIFLASH's flags and fields of requests, and adds to answers and routes."""
