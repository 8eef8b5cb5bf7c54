"""One driver at a time: a lock file with a heartbeat that survives kills, nodes and requeues.

The file says who holds the lock. Exclusive creation of the file keeps starters apart. While one of them
judges and clears a stale lock, ``flock`` on ``<lock>.guard`` does, which the kernel frees when its holder
dies. The heartbeat is written in place through the descriptor that created the file. So a driver that slept
through the loss of its lock writes to a removed file, and not over the lock of its successor.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ddsweep.errors import ResultsError
from ddsweep.results.files import results_error, unreadable_error

__all__ = ["LOST", "SweepLock", "is_stale", "live_holder", "process_start", "read_lock"]

_GUARD_PATIENCE_S = 120.0
"""A hundred elements of an array may start at once, and each reads what the others have written."""

_CONTAINER_STALE_S = 90.0
"""A driver in another container of this host is gone after that long without a heartbeat."""

LOST = "another driver took the sweep's lock over"
"""What a driver says that drains because of it."""


class SweepLock:
    """Context manager: inside it, no other driver works on this sweep.

    The file holds JSON: ``host, pid, process_start, pid_namespace, job, command, since, heartbeat``. The
    heartbeat is refreshed every ``heartbeat_s`` by a daemon thread. A lock of this host whose process is gone
    is taken over at once, one of another container of this host when its heartbeat is older than 90 s, one
    of another host when it is older than ``stale_s``. Otherwise entering raises
    `ResultsError`, which names the holder. ``lost`` becomes true, and ``on_lost`` is called, if another
    driver took this lock over, for example after a long suspension; then the driver should drain. A lock of
    the same Slurm job from before its requeue is stale at once. Holders with the same ``launch`` share it.
    """

    def __init__(
        self,
        path: Path,
        heartbeat_s: float = 30.0,
        stale_s: float = 300.0,
        *,
        launch: str | None = None,
        on_lost: Callable[[], object] = lambda: None,
    ) -> None:
        self.sweep_lock = path
        self.launch = launch
        self._on_lost = on_lost
        # The job matters because containers on one node may each count their processes from 1.
        member = f"{socket.gethostname()}-{os.environ.get('SLURM_JOB_ID', '0')}-{os.getpid()}"
        self.path = path if launch is None else _members(path) / member
        self.heartbeat_s = heartbeat_s
        self.stale_s = stale_s
        self.lost = False
        self._descriptor: int | None = None
        self._content: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SweepLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _guard(self.sweep_lock.with_name(self.sweep_lock.name + ".guard")):
                self._acquire()
                try:
                    self._keep_others_out()
                except ResultsError:
                    self.release()
                    raise
        except OSError as error:
            raise results_error(error, self.path) from error
        self.lost = False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat_forever, name="sweep-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.release()

    def _keep_others_out(self) -> None:
        """Check for the other kind of lock after ours exists: then two starters cannot miss each other."""
        others = [self.sweep_lock] if self.launch is not None else []
        others += [path for path in _members(self.sweep_lock).glob("*") if path != self.path]
        for other in others:
            holder = _settled(other)
            if self.launch is None or holder is None or holder.get("launch") != self.launch:
                _clear_if_stale(other, self.stale_s)

    def release(self) -> None:
        """Let go of it. A context manager does so when it is left."""
        if self._descriptor is None:
            return
        try:
            if self._still_ours():
                self.path.unlink(missing_ok=True)
        except OSError:
            pass  # it becomes stale by itself; a lock that cannot be removed must not hide the real error
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire(self) -> None:
        while True:
            now = _now()
            self._content = {**_identity(), "launch": self.launch, "since": now, "heartbeat": now}
            try:
                self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            except FileExistsError:
                _clear_if_stale(self.path, self.stale_s)
                continue
            try:
                self._write()
            except OSError:  # a full disk: leave no empty lock behind
                self.path.unlink(missing_ok=True)
                os.close(self._descriptor)
                self._descriptor = None
                raise
            return

    def _write(self) -> None:
        # The length never changes, so a reader never sees the tail of an older heartbeat.
        assert self._descriptor is not None
        os.pwrite(self._descriptor, (json.dumps(self._content) + "\n").encode(), 0)
        os.fsync(self._descriptor)

    def _beat_forever(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            try:
                self.lost = not self._still_ours()
                if self.lost:
                    self._on_lost()
                    return
                self._content["heartbeat"] = _now()
                self._write()
            except OSError as error:
                if error.errno == errno.ESTALE:  # NFS: the file of this descriptor was removed
                    self.lost = True
                    self._on_lost()
                    return
                # A full disk or a server that is away: the next beat may succeed.

    def _still_ours(self) -> bool:
        assert self._descriptor is not None
        try:
            there, ours = os.stat(self.path), os.fstat(self._descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def live_holder(path: Path, stale_s: float = 300.0) -> dict[str, Any] | None:
    """The holder of the lock ``path``, or the first to come of those that share it; None if it is free."""
    found = (read_lock(place) for place in (path, *sorted(_members(path).glob("*"))))
    holders = [holder for holder in found if holder is not None and not is_stale(holder, stale_s)]
    return min(holders, key=lambda holder: str(holder.get("since", "")), default=None)


def _members(path: Path) -> Path:
    """The folder of the holders that share the lock ``path``."""
    return path.with_name(path.name + ".d")


def read_lock(path: Path) -> dict[str, Any] | None:
    """The holder of the lock, or None without a lock file.

    If the writer was killed before it wrote anything, or the file is damaged, there is only ``heartbeat``:
    the time of the file. Raises `UnreadableError` if the system cannot read it.
    """
    try:
        modified, text = path.stat().st_mtime, path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable_error(error, path) from error
    try:
        content = json.loads(text)
        if datetime.fromisoformat(content["heartbeat"]).tzinfo is None:
            raise ValueError
        numbers = {name: int(content.get(name) or 0) for name in ("pid", "restart")}
        return {**content, **numbers, "host": str(content["host"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"heartbeat": datetime.fromtimestamp(modified, UTC).isoformat(timespec="microseconds")}


def _settled(path: Path) -> dict[str, Any] | None:
    """`read_lock`, after waiting for content: without flock, a starter may have created the file a moment
    ago."""
    for _ in range(20):
        holder = read_lock(path)
        if holder is None or "host" in holder:
            break
        time.sleep(0.05)
    return holder


def _clear_if_stale(path: Path, stale_s: float) -> None:
    """Remove a stale lock; return if there is none. Raises `ResultsError` if a driver is at work."""
    holder = read_lock(path)
    if holder is None:
        return
    if not is_stale(holder, stale_s):
        raise ResultsError(_describe(holder, path))
    # Rename it to our own name, then look at what was renamed: without flock, another starter may have put
    # its own lock there since we looked. It gets it back.
    aside = path.with_name(f"{path.name}.stale-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        if read_lock(aside) != holder:
            os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)


def is_stale(holder: dict[str, Any], stale_s: float) -> bool:
    """Whether the holder of a lock is gone: a process of this host that ended, this job before its requeue,
    or no heartbeat for ``stale_s``; in another container of this host, for `_CONTAINER_STALE_S`."""
    own_job = holder.get("job") is not None and holder["job"] == os.environ.get("SLURM_JOB_ID")
    if own_job and holder.get("restart", 0) < _restart():
        return True
    # In another container of this host the same number is another process: only its heartbeat tells.
    here = holder.get("pid_namespace", _pid_namespace()) == _pid_namespace()
    if holder.get("host") == socket.gethostname():
        if here:
            started = process_start(holder["pid"])
            # Process numbers are reused: the same number with another start time is another process.
            recorded = holder.get("process_start")
            return started is None or bool(recorded and started and recorded != started)
        stale_s = min(stale_s, _CONTAINER_STALE_S)
    age = datetime.now(UTC) - datetime.fromisoformat(holder["heartbeat"])
    return age.total_seconds() > stale_s


def _describe(holder: dict[str, Any], path: Path) -> str:
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return (
        f"another driver is at work on this sweep: host {holder.get('host', 'unknown')}, "
        f"pid {holder.get('pid', 'unknown')}{job}, since {holder.get('since', 'unknown')}, last sign of life "
        f"{holder['heartbeat']}; wait for it or stop it; if you are sure that it is gone, remove {path}"
    )


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "pid_namespace": _pid_namespace(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": _restart(),
        "command": shlex.join(sys.argv),
    }


def _pid_namespace() -> str | None:
    """In which numbers of processes are counted together; None where /proc does not tell."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _restart() -> int:
    """How often Slurm has requeued the job that this process belongs to."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def process_start(pid: int) -> str | None:
    """Tells this process from a later one of the same number; None if it is gone.

    Clock ticks from boot to its start if /proc has them, else an empty string.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    # The second field is the name in brackets, which may hold spaces and brackets. So count from its end.
    after_name = stat.rpartition(")")[2].split()
    state, start = after_name[0], after_name[19]
    return None if state in "ZX" else start  # a zombie is dead and waits only for its parent


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Lets one starter in at a time, for a moment; the kernel frees it when its holder dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        deadline = time.monotonic() + _GUARD_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # no flock on this file system: exclusive creation alone must do
                if time.monotonic() > deadline:
                    raise ResultsError(
                        f"{path}: another driver is starting on this sweep; try again"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
