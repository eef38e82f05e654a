"""One process at a time works in a workspace: a lock that the system drops with the process that holds it.

The lock is on the file .lock (flock), which also says who holds it, for the one that comes second; it is removed at the
end. A process that was killed leaves the file behind and no lock on it.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from dream_fast.engine.errors import UserError

LOCK = ".lock"
MOST_SAID = 200  # bytes of the file that are shown


class Lock:
    """The lock on ``folder``, held from here to `release`. UserError: another process holds it, and which."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._handle, MOST_SAID).decode("utf-8", "replace")
                os.close(self._handle)
                raise UserError(
                    f"--workspace {folder} is in use by {' '.join(holder.split()) or 'another process'}: wait for it "
                    "to end, or choose another --workspace"
                ) from None
            if self.is_there():
                break
            os.close(self._handle)  # the holder before has just removed the file
        os.ftruncate(self._handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())

    def is_there(self) -> bool:
        """Whether the file that is locked is still the folder's: not moved away, removed, or another's."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._handle))
        except OSError:
            return False

    def release(self) -> None:
        if self.is_there():
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
