"""Import xformers as diffusers does, without its notice and without what its failure keeps in memory."""

import importlib
import logging
import sys
import threading
from contextlib import suppress


class _XformersNotice(logging.Filter):
    """Drops the notice of xformers that its compiled operators do not load with this torch."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("WARNING[XFORMERS]")


_XFORMERS_NOTICE = _XformersNotice()


def quiet_diffusers() -> None:
    """Suppress xformers' notice about its CUDA operators; call it before `import diffusers`.

    diffusers imports xformers where it is installed, and with another build of torch xformers then prints six lines.
    The run itself reports the attention that it uses. Other warnings pass.

    xformers also keeps the exception for good, and with it the frames of all callers: their models would never be
    freed. In a thread of its own the import has no callers.
    """
    logging.getLogger("xformers").addFilter(_XFORMERS_NOTICE)  # adding it twice has no effect
    if "xformers" not in sys.modules:
        thread = threading.Thread(target=_import_xformers)
        thread.start()
        thread.join()


def _import_xformers() -> None:
    with suppress(Exception):  # diffusers reports what it misses
        importlib.import_module("xformers")
