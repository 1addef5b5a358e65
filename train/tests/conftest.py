"""Options, fixtures and the order of all tests are those of `tests/suite.py`."""

pytest_plugins = ("suite",)
