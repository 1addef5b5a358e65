"""The arms: each drafter is a module here with the interface of `base.py`, so the worker needs no change for one."""
