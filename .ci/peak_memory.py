"""Prints the most memory that a command and its children hold together: `python3 .ci/peak_memory.py make test`.

Linux only. The proportional set sizes of all processes (memory that several share counts once) are added up five times
a second.
"""

import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 0.2


def descendants(root: int) -> set[int]:
    """The process and all that came from it, as far as their parents are still there."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, more = set(), {root}
    while more:
        found |= more
        more = {process for process, parent in parents.items() if parent in found} - found
    return found


def proportional_bytes(process: int) -> int:
    """Memory of a process, its share of what others have too; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main(command: list[str]) -> int:
    """The status of the command."""
    process, ended, peak = subprocess.Popen(command), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(SECONDS):
            peak[0] = max(peak[0], sum(map(proportional_bytes, descendants(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = process.wait()
    finally:
        ended.set()
        watcher.join()
        print(f"peak memory {peak[0] / 1e9:.2f} GB", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
