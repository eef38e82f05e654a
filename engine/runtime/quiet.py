"""Import diffusers without the notices that it and xformers print."""

import logging


class _XformersNotice(logging.Filter):
    """Drops the one notice of xformers that its compiled operators do not load beside this torch."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("WARNING[XFORMERS]")


_XFORMERS_NOTICE = _XformersNotice()


def quiet_diffusers() -> None:
    """Call before ``import diffusers``: keeps xformers' notice about its CUDA operators off the terminal.

    diffusers imports xformers when it is installed, and beside a CPU torch xformers then prints six lines about
    operators that nobody asked for. Which attention a run uses is said by the run itself. Other warnings pass.
    """
    logging.getLogger("xformers").addFilter(_XFORMERS_NOTICE)  # adding the same filter twice does nothing
