"""Everything that touches SGLang's private names, for `sglang==0.5.23`. Nothing else imports them.

Replaced names are in the table of `engine/patching.py`, others that are used in `names.PRIVATE_NAMES`, each with the
parameters that this package relies on. Both are checked at every start, and by a test.
"""
