"""The two errors that a user can meet: each is one line, and the command line turns it into an exit code."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names the option, the value and what is allowed (exit code 2)."""


class StageError(RuntimeError):
    """The input was fine but a stage could not do its work: the message says why (exit code 1)."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
