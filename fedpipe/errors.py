"""The one exception a user is meant to read: a single line naming the key or file and what was wanted."""


class FedpipeError(Exception):
    """Bad input or a failed promise; the command line prints it as one line and exits with status 2."""


class Damaged(FedpipeError):
    """An artefact whose bytes are not those that were written."""
