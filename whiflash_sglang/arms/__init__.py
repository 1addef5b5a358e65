"""The arms behind one interface. A new drafter is a new module here; the worker does not change."""
