"""`whiflash bench`: WHIFLASH side by side with plain decoding and SGLang's own speculative arms.

`prompts` reads what is asked, `arms` and `subject` say which servers answer, `load` asks and times,
`reference` checks the outputs against plain decoding, `fleet` and `runner` hold the servers and the run together;
`cells` is what was measured, `report` what is made of it, `pages` how it is shown; `command` carries out what the
command line asked for, `recorded` does for recorded conversations.
"""
