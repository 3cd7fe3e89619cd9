"""Pages: who holds which piece of the key/value cache, what may be shared, what is thrown out first. No tensors here.

Positions are cut into pages of ``page``. There are two groups of pages, because layers forget differently:

* **global**: what grows with the text. Keys and values of full layers, pooled blocks of hybrid layers.
* **window**: what only the last ``keep`` positions need. Window layers and the window branch of hybrid layers; a page
  wholly behind the window is given back while the text goes on.

A full page is known by a hash of all tokens up to its end, so a prompt that begins like an earlier one takes its pages
(the prefix cache, as in arXiv 2312.07104). That holds for both groups: going on at position P needs every global page
before P and only those window pages that the next position can still see. Pages that nobody uses stay until the room is
needed, and the one unused longest goes first.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseek.errors import ConfigError
from deepseek.models import ModelConfig

MOST = 4  #: no more pages than this many times what all running sequences at full length hold
PAGE = 32  #: positions a page holds, more or less: it must be a multiple of the hybrid layers' stride


@dataclass(frozen=True)
class PageLayout:
    """What the pages of a model hold.

    Attributes:
        page: positions per page. keep: how many positions back the window group looks, itself included; 0: no window.
        global_bytes, window_bytes: of one page over all layers; 0 where the group does not exist.
    """

    page: int
    keep: int
    global_bytes: int
    window_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int, page: int = 0) -> PageLayout:
        """The layout for a model whose cache entries take ``itemsize`` bytes.

        Raises:
            ConfigError: ``page`` is not a multiple of the pooled blocks' stride.
        """
        a, kinds = config.attention, config.kinds
        unit = a.stride if "H" in kinds else 1
        page = page or unit * max(1, PAGE // unit)
        if page < 1 or page % unit:
            raise ConfigError(f"page={page} must be a multiple of the pooled blocks' stride, {unit}")
        pair = 2 * a.kv_heads * a.head_dim * itemsize
        full, local, hybrid = (kinds.count(letter) for letter in "FLH")
        keep = max(a.window if "L" in kinds or "H" in kinds else 0, a.block if "H" in kinds else 0)
        return cls(
            page, keep,
            pair * (full * page + hybrid * (page // unit if hybrid else 0)),
            pair * page * local + (pair * page * 3 // 2) * hybrid,
        )  # fmt: skip

    def first_needed(self, position: int) -> int:
        """The first window page that a row at ``position`` still looks into."""
        return max(0, position - self.keep + 1) // self.page

    def window_pages(self, step: int) -> int:
        """The most window pages one sequence holds while ``step`` rows are computed."""
        return (self.keep + step + self.page - 2) // self.page + 1 if self.keep else 0


class PagePool:
    """The pages of one group: ids 1 … count (0 is the trash page), references, and what unused ones still hold."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fresh = list(range(count, 0, -1))  #: unused, and holding nothing of worth
        self._references = [0] * (count + 1)
        self._idle: OrderedDict[int, bytes] = OrderedDict()  #: unused but known, oldest first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that can be had now."""
        return len(self._fresh) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.free

    def take(self) -> int:
        """A page with one reference; what an idle one held is forgotten. There must be a free one."""
        if self._fresh:
            page = self._fresh.pop()
        else:
            page, key = self._idle.popitem(last=False)
            del self._page_of[key], self._hash_of[page]
        self._references[page] = 1
        return page

    def find(self, key: bytes) -> int:
        """The page known by ``key``, or 0."""
        return self._page_of.get(key, 0)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def share(self, page: int) -> None:
        """One more reference to a page that ``find`` gave."""
        self._idle.pop(page, None)
        self._references[page] += 1

    def name(self, page: int, key: bytes) -> None:
        """``page`` is full and final: it can be found by ``key`` from now on, unless another one is."""
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key], self._hash_of[page] = page, key

    def release(self, page: int) -> None:
        """One reference fewer; the last one makes the page idle or, if it has no name, fresh."""
        if not page:
            return
        self._references[page] -= 1
        assert self._references[page] >= 0, f"page {page} was released more often than taken"
        if self._references[page] == 0:
            if page in self._hash_of:
                self._idle[page] = self._hash_of[page]
            else:
                self._fresh.append(page)

    def forget(self) -> None:
        """Drop every name: new weights make old contents wrong."""
        self._fresh.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._hash_of.clear()


@dataclass
class SequencePages:
    """What one sequence holds: page ids by logical page (0: given back), and the hashes of its full pages.

    ``reach`` and ``due`` say where there is something to do next, so that a step need not ask: most have nothing.
    """

    globals: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    named: int = 0  #: leading pages whose names are in the pools
    dropped: int = 0  #: leading window pages given back
    reach: int = 0  #: positions that need no new page
    due: int = 0  #: computed positions before which ``Pages.settle`` does nothing
    changed: bool = True  #: since ``PageTables`` last looked


class Pages:
    """Both groups together. A group that the model does not need has no pages and asks for none."""

    def __init__(
        self, layout: PageLayout, global_pages: int, window_pages: int, prefix_cache: bool = True
    ) -> None:
        self.layout = layout
        self.globals = PagePool(global_pages if layout.global_bytes else 0)
        self.windows = PagePool(window_pages if layout.window_bytes else 0)
        self.prefix_cache = prefix_cache
        self._text = struct.Struct(f"<{layout.page}I")  # the tokens of a page

    @property
    def used(self) -> int:
        return self.globals.used + self.windows.used

    @property
    def total(self) -> int:
        return self.globals.count + self.windows.count

    def hash_pages(self, held: SequencePages, tokens: Sequence[int], salt: bytes, upto: int) -> None:
        """Extend ``held.hashes`` to the pages that ``tokens[:upto]`` fill; ``salt``: what else a page depends on."""
        page, pack = self.layout.page, self._text.pack
        while (len(held.hashes) + 1) * page <= upto:
            start = len(held.hashes) * page
            before = held.hashes[-1] if held.hashes else salt
            text = pack(*tokens[start : start + page])
            held.hashes.append(hashlib.blake2b(before + text, digest_size=16).digest())

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages need not be computed again."""
        if not self.prefix_cache:
            return 0
        most = len(hashes)
        if self.layout.global_bytes:
            most = next((i for i, key in enumerate(hashes) if not self.globals.find(key)), most)
        if not self.layout.window_bytes:
            return most
        for pages in range(most, 0, -1):
            first = self.layout.first_needed(pages * self.layout.page)
            if all(self.windows.find(key) for key in hashes[first:pages]):
                return pages
        return 0

    def cost(self, hashes: Sequence[bytes], pages: int) -> tuple[int, int]:
        """Free pages of each group that ``adopt`` would use up: idle ones come back into use."""
        first = self.layout.first_needed(pages * self.layout.page)
        whole = hashes[:pages] if self.layout.global_bytes else ()
        late = hashes[first:pages] if self.layout.window_bytes else ()
        return (
            sum(self.globals.is_idle(self.globals.find(key)) for key in whole),
            sum(self.windows.is_idle(self.windows.find(key)) for key in late),
        )

    def adopt(self, held: SequencePages, pages: int) -> None:
        """Take the ``pages`` leading pages that ``match`` found."""
        first = self.layout.first_needed(pages * self.layout.page)
        for group, pool, start in self._groups(held):
            skipped = 0 if start else first
            for index in range(pages):
                found = pool.find(held.hashes[index]) if index >= skipped else 0
                if found:
                    pool.share(found)
                group.append(found)
        held.named, held.dropped, held.due, held.changed = pages, first, 0, True
        self._measure(held)

    def needed(self, held: SequencePages, length: int) -> tuple[int, int]:
        """New pages of each group before ``length`` positions fit."""
        pages = -(-length // self.layout.page)
        return (
            max(0, pages - len(held.globals)) if self.layout.global_bytes else 0,
            max(0, pages - len(held.windows)) if self.layout.window_bytes else 0,
        )

    def covers(self, held: SequencePages, length: int) -> bool:
        """Whether ``length`` positions need no new page."""
        return length <= held.reach

    def can_grow(self, held: SequencePages, length: int, spare: tuple[int, int] = (0, 0)) -> bool:
        """Whether ``length`` positions fit and ``spare`` pages of each group stay free."""
        more = self.needed(held, length)
        return more[0] + spare[0] <= self.globals.free and more[1] + spare[1] <= self.windows.free

    def grow(self, held: SequencePages, length: int) -> None:
        """Take the pages that ``length`` positions need; ``can_grow`` was true."""
        pages = -(-length // self.layout.page)
        for group, pool, _ in self._groups(held):
            while len(group) < pages:
                group.append(pool.take())
                held.changed = True
        self._measure(held)

    def settle(self, held: SequencePages, tokens: Sequence[int], salt: bytes, computed: int) -> None:
        """``computed`` positions are final: name the full pages, give back those behind the window."""
        if self.prefix_cache and (held.named + 1) * self.layout.page <= computed:
            self.hash_pages(held, tokens, salt, computed)
            for index in range(held.named, computed // self.layout.page):
                for group, pool, _ in self._groups(held):
                    if group[index]:
                        pool.name(group[index], held.hashes[index])
                held.named = index + 1
        if self.layout.window_bytes:
            first = self.layout.first_needed(computed)
            if first > held.dropped:
                first = min(first, len(held.windows))
                for index in range(held.dropped, first):
                    self.windows.release(held.windows[index])
                    held.windows[index] = 0
                held.dropped, held.changed = max(held.dropped, first), True
        page = self.layout.page
        named = (held.named + 1) * page if self.prefix_cache else sys.maxsize
        late = (held.dropped + 1) * page + self.layout.keep - 1 if self.layout.window_bytes else sys.maxsize
        held.due = min(named, late)

    def release(self, held: SequencePages) -> None:
        """Give everything back; the end of the text becomes the oldest, so that beginnings stay longest."""
        for group, pool, _ in self._groups(held):
            for page in reversed(group):
                pool.release(page)
            group.clear()
        held.named = held.dropped = held.due = held.reach = 0
        held.changed = True

    def forget(self) -> None:
        """Drop the prefix cache."""
        self.globals.forget()
        self.windows.forget()

    def _measure(self, held: SequencePages) -> None:
        held.reach = self.layout.page * min((len(group) for group, _, _ in self._groups(held)), default=0)

    def _groups(self, held: SequencePages) -> list[tuple[list[int], PagePool, bool]]:
        """The groups in use; the flag says that every page from the first on is needed."""
        found = []
        if self.layout.global_bytes:
            found.append((held.globals, self.globals, True))
        if self.layout.window_bytes:
            found.append((held.windows, self.windows, False))
        return found


def share_memory(layout: PageLayout, budget: int, running: int, step: int, longest: int) -> tuple[int, int]:
    """How many pages of each group ``budget`` bytes buy.

    The window group gets what ``running`` sequences hold at most, and as much again for prefixes worth keeping, but not
    more than half of the memory while there is a global group; the global group gets the rest.

    Raises:
        ConfigError: not even one sequence of ``longest`` positions fits.
    """
    one_window = layout.window_pages(min(step, longest))
    one_global = -(-longest // layout.page)
    whole = max(running * (layout.window_pages(1) + 1) + one_window, one_window)
    windows = 2 * whole if layout.window_bytes else 0
    if layout.window_bytes and layout.global_bytes:
        windows = max(one_window, min(windows, budget // 2 // layout.window_bytes))
    elif layout.window_bytes:
        windows = budget // layout.window_bytes
    left = budget - windows * layout.window_bytes
    globals_ = left // layout.global_bytes if layout.global_bytes else 0
    short = (layout.global_bytes and globals_ < one_global) or (layout.window_bytes and windows < one_window)
    if short:
        need = one_global * layout.global_bytes + one_window * layout.window_bytes
        raise ConfigError(
            f"the cache has {budget / 2**20:,.1f} MiB, but one sequence of {longest} positions needs "
            f"{need / 2**20:,.1f} MiB: raise memory_gib or lower max_length"
        )
    return min(globals_, MOST * running * one_global), min(windows, MOST * running * one_global)
