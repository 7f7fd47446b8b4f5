"""The one error of setting up the lab."""


class SetupError(Exception):
    """Setting the lab up failed; the message says what is missing or went wrong, and what to do."""
