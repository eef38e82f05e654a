"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix, as one clear sentence.

    The command prints `dream-fast: error: <sentence>` and exits with status 2. Any other exception is a bug and keeps
    its traceback.
    """


def first_line(error: BaseException | str) -> str:
    """Return the first line of the message of `error`, or its type: messages of libraries have several lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
