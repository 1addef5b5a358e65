"""Everything that touches SGLang's private names, for `sglang==0.5.23`. Nothing else imports them.

`names.PRIVATE_NAMES` lists each of them with the parameters this package relies on; the plugin checks the
list at every start and a test checks it in CI.
"""
