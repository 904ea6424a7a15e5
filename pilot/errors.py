"""Errors that a user can cause or cure. Standard library only."""


class PilotError(Exception):
    """Base of the errors that a user can cause or cure: the message is one sentence that says how."""


class ConfigError(PilotError, ValueError):
    """A run-config key is unknown, mistyped or out of range."""
