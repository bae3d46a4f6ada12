"""What goes wrong with values that a person typed."""


class UsageError(Exception):
    """A value that cannot be used: the message says what was given and what is needed."""
