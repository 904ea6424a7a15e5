"""The one exception that a command line turns into a sentence. Standard library only."""


class UserError(Exception):
    """A mistake its reader can repair: one sentence that says what is wrong and what to do."""
