"""Reads WHIFLASH's fields from requests, adds them to answers, and adds routes to SGLang's HTTP process."""
