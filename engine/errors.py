"""The one exception of the engine that is meant for the person who typed the command."""


class UserError(Exception):
    """A mistake that the user can put right, as one clear sentence.

    The command prints ``dream-fast: error: <sentence>`` and exits with status 2. Anything else that escapes is our own
    defect and keeps its traceback.
    """


def first_line(error: BaseException | str) -> str:
    """The first line of what ``error`` says, or its name: libraries explain over several lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
