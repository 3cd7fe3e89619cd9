"""The scheduler: which rows the next step computes. It decides anew at every step, and touches no tensor.

Sequences that already answer come first, one row each (more with drafts), so that nobody who reads waits for somebody
else's prompt; what is left of the step's budget goes to prompts, cut into chunks (chunked prefill, arXiv 2403.02310). A
prompt is admitted when its pages fit; when a running sequence finds no page, the one that came last and matters least
is preempted: its pages go back, and it waits to be computed again, from whatever the prefix cache still has then.

``plan`` knows every token. ``follow`` plans the step after one whose tokens nobody has seen yet, where that can be done
without a decision: one more row for everybody.
"""

from __future__ import annotations

import bisect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from deepseek.serve.pages import Pages, SequencePages
from deepseek.serve.request import Request

_new = tuple.__new__  # of a ``Work`` without the call of Python that ``Work(…)`` is


@dataclass(eq=False)
class Scheduled:
    """A request on its way: its tokens, how many of them the cache holds, and its pages.

    Attributes:
        tokens: prompt and answer. computed: leading tokens whose keys and values are in the cache.
        most: tokens at which it ends, if nothing ends it before.
        draft: tokens that speculation proposes to come next.
        engine: what the engine keeps beside it (sampling state, text); the scheduler does not look at it.
    """

    request: Request
    tokens: list[int]
    order: int = 0
    arrival: float = field(default_factory=time.monotonic)
    salt: bytes = b""
    computed: int = 0
    cached: int = 0
    queued: float = 0.0
    draft: list[int] = field(default_factory=list)
    pages: SequencePages = field(default_factory=SequencePages)
    engine: Any = None
    preempted: int = 0
    most: int = sys.maxsize
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)

    @property
    def decoding(self) -> bool:
        """Only its newest token is not computed yet."""
        return self.computed == len(self.tokens) - 1 and len(self.tokens) > self.prompt_length

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first."""
        return self.request.priority, self.order


class Work(NamedTuple):
    """``rows`` rows of a sequence from position ``start`` on; drafts, if any, are its last rows."""

    sequence: Scheduled
    start: int
    rows: int
    drafts: int = 0

    @property
    def samples(self) -> bool:
        """Whether its last rows say what comes next: the sequence is computed to its end."""
        return self.start + self.rows - self.drafts == len(self.sequence.tokens)


class Plan(NamedTuple):
    """The next step: decoding sequences first, then prompts; and who had to make room."""

    work: list[Work]
    preempted: list[Scheduled]


class Budget(Protocol):
    """How many rows the next step may compute in all; the seam for the policies of the scheduling study."""

    def rows(self, decoding: int, waiting_rows: int) -> int:
        """``decoding`` rows are certain; ``waiting_rows`` rows of prompts could be computed."""
        ...


@dataclass(frozen=True)
class StaticBudget:
    """Always the same number of rows."""

    most: int

    def rows(self, decoding: int, waiting_rows: int) -> int:
        return self.most


class Scheduler:
    """Waiting and running sequences. ``plan`` decides a step, ``advance`` records what it did."""

    def __init__(
        self,
        pages: Pages,
        *,
        max_running: int,
        budget: Budget,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pages, self.max_running, self.budget, self.clock = pages, max_running, budget, clock
        self.waiting: list[Scheduled] = []  #: by rank
        self.running: list[Scheduled] = []  #: by rank
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prompt_rows = 0  #: rows of prompts that are left to compute, waiting and running
        self.rows = 0  #: rows computed so far, and those that the prefix cache had
        self._arrivals = 0
        self._stuck: tuple[int, int, int] | None = None  #: see ``admits``
        self._promised: dict[bytes, Scheduled] = {}  #: pages of prompts that somebody is computing now

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Scheduled) -> None:
        """Let a sequence wait its turn."""
        self._stuck = None
        sequence.order, self._arrivals = self._arrivals, self._arrivals + 1
        self.prompt_rows += len(sequence.tokens)
        self._wait(sequence)

    def remove(self, sequence: Scheduled) -> None:
        """Forget a sequence wherever it is; its pages go back."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
        if not sequence.decoding:
            self.prompt_rows = max(0, self.prompt_rows - len(sequence.tokens) + sequence.computed)
        self._retire(sequence)

    def plan(self) -> Plan:
        """The rows of the next step; their pages are taken. Empty when nothing can run."""
        work: list[Work] = []
        preempted: list[Scheduled] = []
        decoding, prompts = list[Scheduled](), list[Scheduled]()
        for sequence in self.running:
            (decoding if sequence.decoding else prompts).append(sequence)
        waiting_rows = sum(len(s.tokens) - s.computed for s in (*prompts, *self.waiting))
        self.prompt_rows, hits = waiting_rows, self.prefix_hits
        left = max(self.budget.rows(len(decoding), waiting_rows), len(decoding), 1)
        for sequence in decoding:
            if not sequence.draft and sequence.computed < sequence.pages.reach and not preempted:
                work.append(_new(Work, (sequence, sequence.computed, 1, 0)))
                left -= 1
                continue
            if sequence in preempted:
                continue
            wanted = min(len(sequence.draft), left - (len(decoding) - len(work)))
            drafts = self._make_room(sequence, sequence.computed + 1, max(0, wanted), preempted)
            if drafts is None:
                continue
            work.append(Work(sequence, sequence.computed, 1 + drafts, drafts))
            left -= 1 + drafts
        answers = len(work)
        for sequence in prompts:
            if left <= 0:
                break
            if sequence not in preempted:
                left -= self._prefill(sequence, left, work, preempted)
        if not preempted:
            self._admit(left, work)
        read = work[answers:]
        if preempted:
            gone = set(map(id, preempted))
            work, read = ([w for w in some if id(w.sequence) not in gone] for some in (work, read))
        self.prompt_rows -= rows_of(read) + self.prefix_hits - hits
        return Plan(work, preempted)

    @property
    def admits(self) -> bool:
        """Whether ``plan`` might start somebody who waits: not if it found no room, and none has come free since."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        if self._stuck is None:
            return True
        return any(now > then for now, then in zip(self._room(), self._stuck))

    def follow(self, going: Sequence[Work]) -> list[Work]:
        """One more row after each of ``going``, work of a step whose tokens are not known yet; their pages are taken.

        Empty where ``plan`` must decide: nobody goes on, somebody else may start, or pages are short. It assumes that
        all running sequences are in that step, and those that are not in ``going`` end with it.
        """
        if self.waiting and (self.admits or len(going) < len(self.running)):
            return []
        work = [_new(Work, (sequence, start + rows, 1, 0)) for sequence, start, rows, _ in going]
        pages, globals_, windows = self.pages, 0, 0
        growing = [w for w in work if w.start >= w.sequence.pages.reach]
        for w in growing:
            more = pages.needed(w.sequence.pages, w.start + 1)
            globals_, windows = globals_ + more[0], windows + more[1]
        if globals_ > pages.globals.free or windows > pages.windows.free:
            return []
        for w in growing:
            pages.grow(w.sequence.pages, w.start + 1)
        return work

    def advance(self, work: Work, accepted: int) -> None:
        """``accepted`` of the work's rows are final: all of a prompt's, of drafts those that were right."""
        sequence = work.sequence
        sequence.computed = work.start + accepted
        self.rows += accepted
        if sequence.computed >= sequence.pages.due:
            self._settle(sequence)

    def advance_all(self, work: Sequence[Work]) -> None:
        """``advance`` for each, all of whose rows are final."""
        self.rows += rows_of(work)
        for sequence, start, rows, _ in work:
            sequence.computed = computed = start + rows
            if computed >= sequence.pages.due:
                self._settle(sequence)

    def _settle(self, sequence: Scheduled) -> None:
        """Name pages that are full, and give back those behind the window."""
        known = sequence.pages.named
        self.pages.settle(sequence.pages, sequence.tokens, sequence.salt, sequence.computed)
        if self._promised:
            for key in sequence.pages.hashes[known : sequence.pages.named]:
                if self._promised.get(key) is sequence:
                    del self._promised[key]

    def _prefill(self, sequence: Scheduled, left: int, work: list[Work], preempted: list[Scheduled]) -> int:
        """Plan the next chunk of a prompt that runs already; how many rows."""
        count = min(left, len(sequence.tokens) - sequence.computed)
        while count and self._make_room(sequence, sequence.computed + count, 0, preempted) is None:
            if sequence in preempted:
                return 0
            count //= 2
        if count:
            work.append(Work(sequence, sequence.computed, count))
        return count

    def _make_room(
        self, sequence: Scheduled, length: int, drafts: int, preempted: list[Scheduled]
    ) -> int | None:
        """Pages for ``length`` positions and, if they can be had for nothing, for drafts; ``None``: no room.

        Lower ranks are preempted, in the end the sequence itself if somebody else runs.
        """
        if self.pages.covers(sequence.pages, length + drafts):
            return drafts
        if drafts and self.pages.can_grow(sequence.pages, length + drafts):
            self.pages.grow(sequence.pages, length + drafts)
            return drafts
        while not self.pages.can_grow(sequence.pages, length):
            last = self.running[-1]
            if last is sequence and len(self.running) == 1:
                return None
            self._preempt(last)
            preempted.append(last)
            if last is sequence:
                return None
        self.pages.grow(sequence.pages, length)
        return 0

    def _admit(self, left: int, work: list[Work]) -> None:
        """Start waiting sequences in order while budget, places and pages last."""
        index, self._stuck = 0, None
        while left > 0 and len(self.running) < self.max_running and index < len(self.waiting):
            sequence = self.waiting[index]
            count = self._start(sequence, left)
            if count is None:
                self._stuck = self._room()
                break  # no room: nobody overtakes, or a long prompt would wait for ever
            if count == 0:
                index += 1  # somebody computes the same beginning just now: wait for it
                continue
            del self.waiting[index]
            bisect.insort(self.running, sequence, key=lambda s: s.rank)
            work.append(Work(sequence, sequence.computed, count))
            left -= count

    def _start(self, sequence: Scheduled, left: int) -> int | None:
        """Adopt what the prefix cache has and take pages for the first chunk; 0: later, ``None``: no room."""
        pages, held = self.pages, sequence.pages
        found = 0
        if pages.prefix_cache:
            pages.hash_pages(held, sequence.tokens, sequence.salt, len(sequence.tokens))
            usable = held.hashes[: self._reusable(sequence)]
            found = pages.match(usable)
            if found < len(usable) and self._promised.get(usable[found], sequence) is not sequence:
                return 0
        # The whole prompt must fit beside what the others may need for their next token.
        start = found * pages.layout.page
        whole = -(-(len(sequence.tokens) + 1) // pages.layout.page)
        count = min(left, len(sequence.tokens) - start)
        again = pages.cost(held.hashes, found)
        spare = len(self.running)
        layout = pages.layout
        if layout.global_bytes and whole - found + again[0] + spare > pages.globals.free and self.running:
            return None
        need = layout.window_pages(count) + 1
        if layout.window_bytes and need + again[1] + spare > pages.windows.free and self.running:
            return None
        pages.adopt(held, found)
        sequence.computed = start
        while count and not pages.can_grow(held, start + count):
            count //= 2
        if not count:
            pages.release(held)
            sequence.computed = 0
            return None
        pages.grow(held, start + count)
        self.prefix_queries += len(sequence.tokens)
        self.prefix_hits += start
        self.rows += start
        if sequence.preempted == 0:
            sequence.cached = start
            sequence.queued = time.monotonic() - sequence.arrival
        for key in held.hashes[found:]:
            self._promised.setdefault(key, sequence)
        return count

    def _room(self) -> tuple[int, int, int]:
        """What ``_start`` weighs; more of any of it may let somebody in."""
        return self.pages.globals.free, self.pages.windows.free, -len(self.running)

    def _reusable(self, sequence: Scheduled) -> int:
        """Leading pages that may come from the cache: at least one row is computed, to have logits."""
        request = sequence.request
        unread = (
            len(sequence.tokens) == sequence.prompt_length
        )  # nothing is sampled before the prompt is read
        if request.embed or (request.sampling.prompt_logprobs is not None and unread):
            return 0
        return (len(sequence.tokens) - 1) // self.pages.layout.page

    def _preempt(self, sequence: Scheduled) -> None:
        self.running.remove(sequence)
        self.prompt_rows += len(sequence.tokens) if sequence.decoding else sequence.computed
        self._retire(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        self._wait(sequence)

    def _retire(self, sequence: Scheduled) -> None:
        """Give pages and promises back."""
        self.pages.release(sequence.pages)
        for key in sequence.pages.hashes:
            if self._promised.get(key) is sequence:
                del self._promised[key]
        sequence.computed, sequence.draft = 0, []

    def _wait(self, sequence: Scheduled) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.rank)


def rows_of(work: Sequence[Work]) -> int:
    """Rows of a step."""
    return sum([w.rows for w in work])
