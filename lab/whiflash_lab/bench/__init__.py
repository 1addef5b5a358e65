"""`whiflash bench`: WHIFLASH side by side with plain decoding and SGLang's own speculative arms.

`prompts` reads the prompts, `arms` and `subject` define the servers, `load` asks and times them, and `reference`
compares answers with plain decoding's. `fleet` runs the servers, `runner` the schedule. `cells` has the measurements,
`report` computes figures from them, `pages` renders these. `command` carries out the command line, `recorded` plays
recorded conversations.
"""
