"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake that the user can put right, as one clear sentence.

    The command prints `dream-fast: error: <sentence>` and exits with status 2. Any other exception is a defect of the
    program and keeps its traceback.
    """


def first_line(error: BaseException | str) -> str:
    """Return the first line of the message of `error`, or its name: libraries explain over several lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
