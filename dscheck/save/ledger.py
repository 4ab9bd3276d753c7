"""What became of the saves of one Checkpointer: which step may come next, and which failures are still to be told."""

from __future__ import annotations

from dscheck.errors import ConfigError, SaveSkippedError
from dscheck.save.handle import SaveHandle


class Ledger:
    """`settle` looks at the saves that have ended since; the other methods speak of what it saw."""

    def __init__(self) -> None:
        self._newest: int | None = None
        self._under_way: list[SaveHandle] = []
        self._untold: list[Exception] = []

    def settle(self) -> None:
        """Take in which saves have ended, and how."""
        for handle in [handle for handle in self._under_way if handle.done]:
            self._under_way.remove(handle)
            error = handle.error
            if error is None:
                self._newest = max(handle.step, handle.step if self._newest is None else self._newest)
            elif not isinstance(error, SaveSkippedError) and not any(error is untold for untold in self._untold):
                self._untold.append(error)  # several saves may have ended by one error

    def restart(self, step: int | None) -> None:
        """A load made `step` the last one; what was before it is past."""
        self._newest, self._under_way, self._untold = step, [], []

    def add(self, handle: SaveHandle) -> None:
        self._under_way.append(handle)

    @property
    def newest(self) -> int | None:
        """The highest step loaded, committed or under way; one that failed does not count."""
        steps = [handle.step for handle in self._under_way]
        return max(steps if self._newest is None else [*steps, self._newest], default=None)

    def check(self, step: int) -> None:
        """Raises ConfigError unless `step` exceeds the newest."""
        newest = self.newest
        if newest is not None and step <= newest:
            raise ConfigError(f"step {step} does not exceed step {newest}, the last one loaded, saved or being saved")

    def raise_untold(self) -> None:
        """Raise the first error of a save that was not raised yet, if there is one."""
        if self._untold:
            raise self._untold.pop(0)
