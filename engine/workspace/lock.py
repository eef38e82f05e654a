"""The lock of a workspace, which ends with the process that holds it.

The lock is on the file .lock (flock), which contains the holder's process and machine for messages, and is removed at
the end. A process that was killed leaves the file behind without a lock on it.

On a disk without locks (some network and cluster file systems) the file .lock.lease replaces it (filelock's
SoftFileLease). Its holder renews it. Another process may take it over when the holder's process no longer exists on
the same machine, or when it was not renewed for LEASE_SECONDS. Where that fails too, the run continues without a lock,
with a logged warning.
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
from dream_fast.engine.files import CAREFUL, BadFile, is_regular, kind_of, read_regular

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEASE = ".lock.lease"
LEASE_SECONDS = 120.0  # longer than the longest part of an export in which Python cannot renew it
HOLDER = b"process "  # the beginning of the file
MAX_HOLDER_BYTES = 200  # of the file, in messages
NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Lock:
    """Holds the lock on `folder` until `release()`. Raises UserError: when another process holds it."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self._lease: SoftFileLease | None = None
        while True:
            self._handle = self._open()
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._handle, MAX_HOLDER_BYTES).decode("utf-8", "replace")
                os.close(self._handle)
                raise self._in_use(" ".join(holder.split())) from None
            except OSError as error:
                if error.errno not in NO_LOCK_ERRORS:
                    os.close(self._handle)
                    raise
                self._take_lease()
                return
            if self.is_valid():
                break
            os.close(self._handle)  # the previous holder has just removed the file
        os.ftruncate(self._handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self._handle, HOLDER + f"{os.getpid()} on {socket.gethostname()} since {started}\n".encode())

    def _open(self) -> int:
        """Return a handle of the file. Raises BadFile: it is none that this program wrote."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | CAREFUL, 0o666)
        info = os.fstat(handle)
        beginning = b"" if kind_of(info.st_mode) else os.pread(handle, len(HOLDER), 0)
        if kind_of(info.st_mode) or info.st_nlink > 1 or not HOLDER.startswith(beginning):
            os.close(handle)
            raise BadFile(self.path, "is in the way: dream-fast did not write it; move it away")
        return handle

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"--workspace {self.folder} is in use by {holder or 'another process'}: wait for it to end, or choose "
            "another --workspace"
        )

    def _take_lease(self) -> None:
        """Take the lease instead of the lock, or neither where the disk does not allow a lease."""
        os.close(self._handle)
        self.path.unlink(missing_ok=True)
        if os.path.lexists(self.folder / LEASE) and not is_regular(self.folder / LEASE):
            raise BadFile(self.folder / LEASE, "is in the way: dream-fast did not write it; move it away")
        lease = SoftFileLease(self.folder / LEASE, lease_duration=LEASE_SECONDS, thread_local=False)
        try:
            self._acquire(lease)
        except Timeout:
            raise self._in_use(_holder(lease)) from None
        except (OSError, RuntimeError) as error:
            logger.warning(
                "the disk of %s has no locks (%s): make sure that no other run uses this workspace",
                self.folder,
                first_line(error),
            )
            self.path = self.folder.resolve()
        else:
            self._lease, self.path = lease, self.folder / LEASE
        self._handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)

    def _acquire(self, lease: SoftFileLease) -> None:
        """Raises Timeout: when another process holds the lease, on this machine or still renewing it."""
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

    def is_valid(self) -> bool:
        """True if the locked file is still the one in the folder, neither moved nor removed nor replaced."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._handle))
        except OSError:
            return False

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()
        elif self.path.name == LOCK and self.is_valid():
            self.path.unlink(missing_ok=True)
        os.close(self._handle)


def _holder(lease: SoftFileLease) -> str:
    """The holder of the lease, from its file."""
    try:
        text = read_regular(Path(lease.lock_file)).decode("utf-8", "replace")
        lines = text[:MAX_HOLDER_BYTES].splitlines()
    except (OSError, BadFile):
        return ""
    entries = dict(line.split("=", 1) for line in lines if "=" in line)
    return f"process {entries.get('pid', '?')} on {entries.get('host', '?')}"
