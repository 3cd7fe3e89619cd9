"""What detectors have learnt, kept from one process of a run to the next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from deepseek.errors import RunError
from deepseek.events import Event, Sink
from deepseek.monitor.detect import Watch
from deepseek.monitor.store import RunStore

MEMORY = "watch"  #: key of the store


class WatchMemory(Sink):
    """Keeps what a watch has learnt to think usual, from one process of a run to the next.

    To be attached before the sink that feeds the watch: sinks are closed in reverse order.
    """

    def __init__(self, watch: Watch, run: Path, resumed: bool) -> None:
        self.watch, self.run, self.waiting = watch, run, resumed

    def write(self, event: Event) -> None:
        if self.waiting:  # the first event comes before the first row
            self.waiting = False
            state = None
            with suppress(RunError), RunStore(self.run) as store:
                state = store.meta(MEMORY)
            if state is not None:
                self.watch.load_state_dict(state)

    def close(self) -> None:
        with suppress(RunError), RunStore(self.run) as store:
            store.set_meta(MEMORY, self.watch.state_dict())
