"""`whiflash bench`: WHIFLASH side by side with plain decoding and SGLang's own speculative arms.

`prompts` reads what is asked, `arms` says which servers answer, `schedule` in which order, `load` asks and times,
`reference` checks the outputs against plain decoding, `fleet` and `runner` hold the servers and the run together;
`cells` is what was measured, `statistics`, `report`, `markdown` and `plots` are what is made of it; `command` carries
out what the command line asked for.
"""
