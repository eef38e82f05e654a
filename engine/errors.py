"""The one exception of the engine that is meant for the person who typed the command."""


class UserError(Exception):
    """A mistake that the user can put right, as one clear sentence.

    The command prints ``dream-fast: error: <sentence>`` and exits with status 2. Anything else that escapes is our own
    defect and keeps its traceback.
    """
