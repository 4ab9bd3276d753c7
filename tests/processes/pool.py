"""Real ranks: processes, forked from one that has imported torch once, that talk over gloo and may be killed."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forkserver import CONTEXT

GROUP_S = 60.0
"""How long a collective of the training itself may take."""


@dataclass(slots=True)
class Ended:
    """How one rank ended: with a value, an error, or by a signal; and what it had noted until then.

    `notes` are (time.monotonic(), note) pairs; all processes of a host share that clock.
    """

    rank: int
    log: Path
    value: Any = None
    error: BaseException | None = None
    signal: int | None = None
    at: float = 0.0
    notes: list[tuple[float, Any]] = field(default_factory=list)

    def result(self) -> Any:
        """What the rank returned; raises with the end of its log when it returned nothing."""
        if self.error is not None or self.signal is not None:
            log = self.log.read_text(errors="replace")[-4000:]
            raise AssertionError(f"rank {self.rank} ended by {self.error!r}, signal {self.signal}:\n{log}")
        return self.value


class Job:
    """`size` ranks that run `role(rank, *args)`, with a gloo group unless `group` is false.

    They are started at once. `folder` gets their logs and must be fresh. `env` is added to their environment.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        role: Callable[..., Any],
        *args: Any,
        group: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.ended = [Ended(rank, folder / f"rank-{rank}.log") for rank in range(size)]
        self._processes, self._pipes = [], []
        given = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} | (env or {})
        for rank in range(size):
            reader, writer = CONTEXT.Pipe(duplex=False)
            where = (folder, size if group else 0, given, writer)
            process = CONTEXT.Process(target=_serve, args=(rank, where, role, args))
            process.start()
            writer.close()
            self._processes.append(process)
            self._pipes.append(reader)

    def kill(self, *ranks: int) -> float:
        """SIGKILL these ranks; the moment of it."""
        for rank in ranks:
            os.kill(self._pid(rank), signal.SIGKILL)
        return time.monotonic()

    def wait_for(self, rank: int, kind: str, times: int = 1, timeout_s: float = 60.0) -> None:
        """Return when `rank` has made so many notes of this kind, their first item; raises when it ends before."""
        until = time.monotonic() + timeout_s
        while [what[0] for _, what in self.ended[rank].notes].count(kind) < times:
            if not (self._pipes[rank].poll(max(0.0, until - time.monotonic())) and self._receive(rank)):
                self.end()
                self.ended[rank].result()
                raise AssertionError(f"rank {rank} did not note {kind!r} within {timeout_s} s")

    def join(self, timeout_s: float = 90.0) -> list[Ended]:
        """How all ranks ended. What is left after `timeout_s` is killed, and shows as that."""
        until = time.monotonic() + timeout_s
        left = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while left and (ready := wait(left, max(0.0, until - time.monotonic()))):
            for pipe in ready:
                if not self._receive(left[pipe]):
                    del left[pipe]
        self.end()
        return self.ended

    def results(self, timeout_s: float = 90.0) -> list[Any]:
        """What all ranks returned."""
        return [ended.result() for ended in self.join(timeout_s)]

    def end(self) -> None:
        """End what still runs, and learn how the ranks ended."""
        for ended, process in zip(self.ended, self._processes, strict=True):
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode is not None and process.exitcode < 0:
                ended.signal = -process.exitcode

    def _pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def _receive(self, rank: int) -> bool:
        """Take one message of a rank; whether more may come."""
        ended = self.ended[rank]
        try:
            at, kind, value = self._pipes[rank].recv()
        except (EOFError, OSError):
            return False
        if kind == "note":
            ended.notes.append((at, value))
        else:
            ended.at = at
            setattr(ended, kind, value)
        return True


_parent: Connection | None = None


def note(kind: str, *what: Any) -> None:
    """Tell the parent something that it will know even if this rank is killed right after."""
    assert _parent is not None
    _parent.send((time.monotonic(), "note", (kind, *what)))


def _serve(
    rank: int, where: tuple[Path, int, dict[str, str], Connection], role: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    global _parent
    folder, size, env, _parent = where
    os.environ.update(env)
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if size:
            _open_group(folder, rank, size)
        value = role(rank, *args)
    except BaseException as error:
        traceback.print_exc()
        _parent.send((time.monotonic(), "error", _plain(error)))
    else:
        _parent.send((time.monotonic(), "value", value))
    sys.stdout.flush()
    sys.stderr.flush()
    # As an interpreter ends, but for torch's own seconds of it.
    os._exit(0)


def _open_group(folder: Path, rank: int, size: int) -> None:
    import torch.distributed as dist

    # Through a file: a port that was free may be taken by now.
    init, patience = f"file://{folder}/group", timedelta(seconds=GROUP_S)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size, timeout=patience)


def _plain(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
