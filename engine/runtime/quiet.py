"""Suppress the notice that diffusers' import of xformers prints."""

import logging


class _XformersNotice(logging.Filter):
    """Drops the notice of xformers that its compiled operators do not load with this torch."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("WARNING[XFORMERS]")


_XFORMERS_NOTICE = _XformersNotice()


def quiet_diffusers() -> None:
    """Suppress xformers' notice about its CUDA operators; call it before `import diffusers`.

    diffusers imports xformers where it is installed, and with a CPU build of torch xformers then prints six lines. The
    run itself reports the attention that it uses. Other warnings pass.
    """
    logging.getLogger("xformers").addFilter(_XFORMERS_NOTICE)  # adding it twice has no effect
