"""Everything that touches SGLang's private names, for `sglang==0.5.23`. Nothing else imports them.

What is replaced is in the table of `compat/patching.py`, what else is used in `names.PRIVATE_NAMES`, each with the
parameters that this package relies on. Both are checked at every start, and by a test.
"""
