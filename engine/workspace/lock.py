"""One process at a time works in a workspace: a lock that ends with the process that holds it.

The lock is on the file .lock (flock), which also says who holds it, for the one that comes second; it is removed at the
end. A process that was killed leaves the file behind and no lock on it.

On a disk without locks (some network and cluster file systems) the file .lock.lease takes its place (filelock's
SoftFileLease): its holder renews it, and it may be taken over when its process is gone from this machine, or when it
was not renewed for LEASE_SECONDS. Where that fails too, the run goes on without a lock, with a logged warning.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from filelock import SoftFileLease, Timeout

from dream_fast.engine.errors import UserError, first_line

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEASE = ".lock.lease"
LEASE_SECONDS = 120.0  # long enough for a step of the export that keeps Python from renewing it
MOST_SAID = 200  # bytes of the file that are shown
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Lock:
    """The lock on ``folder``, held from here to `release`. UserError: another process holds it, and which."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self._lease: SoftFileLease | None = None
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._handle, MOST_SAID).decode("utf-8", "replace")
                os.close(self._handle)
                raise self._in_use(" ".join(holder.split())) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(self._handle)
                    raise
                self._take_lease()
                return
            if self.is_there():
                break
            os.close(self._handle)  # the holder before has just removed the file
        os.ftruncate(self._handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"--workspace {self.folder} is in use by {holder or 'another process'}: wait for it to end, or choose "
            "another --workspace"
        )

    def _take_lease(self) -> None:
        """Hold the lease in place of the lock; without either where the disk does not do that."""
        os.close(self._handle)
        self.path.unlink(missing_ok=True)
        lease = SoftFileLease(self.folder / LEASE, lease_duration=LEASE_SECONDS, thread_local=False)
        try:
            self._acquire(lease)
        except Timeout:
            raise self._in_use(_holder(lease)) from None
        except (OSError, RuntimeError) as error:
            logger.warning(
                "the disk of %s has no locks (%s): take care that no other run works in this workspace",
                self.folder,
                first_line(error),
            )
            self.path = self.folder.resolve()
        else:
            self._lease, self.path = lease, self.folder / LEASE
        self._handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)

    def _acquire(self, lease: SoftFileLease) -> None:
        """Raises Timeout: another process holds the lease, on this machine or still renewing it."""
        try:
            lease.acquire(timeout=0)
        except Timeout:
            if f"on {socket.gethostname()}" in (holder := _holder(lease)):
                raise
            logger.warning(
                "the disk of %s has no locks, and %s holds the workspace: waiting up to %.0f s in case it has ended",
                self.folder,
                holder or "another process",
                1.25 * LEASE_SECONDS,
            )
            lease.acquire(timeout=1.25 * LEASE_SECONDS)

    def is_there(self) -> bool:
        """Whether the file that is locked is still the folder's: not moved away, removed, or another's."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._handle))
        except OSError:
            return False

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()
        elif self.path.name == LOCK and self.is_there():
            self.path.unlink(missing_ok=True)
        os.close(self._handle)


def _holder(lease: SoftFileLease) -> str:
    """Who holds the lease, as its file has it."""
    try:
        lines = Path(lease.lock_file).read_text(encoding="utf-8", errors="replace")[:MOST_SAID].splitlines()
    except OSError:
        return ""
    facts = dict(line.split("=", 1) for line in lines if "=" in line)
    return f"process {facts.get('pid', '?')} on {facts.get('host', '?')}"
