"""Errors that end a command with one line."""


class UsageError(Exception):
    """A value that cannot be used: the message says what was given and what is needed."""


class WriteError(Exception):
    """The results could not be written."""
