"""The one exception that means "the input is bad".

Everything a user can get wrong (a missing file, a wrong field, a truncated checkpoint) is raised as InputError before
the expensive part starts. The command line prints it as one line and exits with code 2; any other exception is a bug.
"""


class InputError(Exception):
    """Bad input. The message is one line and names the file, the field and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RankLost(Exception):
    """Another process of a distributed run has died. The message names it, and what to do."""
