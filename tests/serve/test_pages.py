"""Pages and the scheduler against an oracle that writes down what every page really holds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.models import ModelConfig
from deepseek.nn.attention import AttentionConfig
from deepseek.serve.pages import PageLayout, PagePool, Pages, SequencePages, share_memory
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.scheduler import Scheduled, Scheduler, StaticBudget, Work, rows_of

LAYOUTS = {
    "both": PageLayout(page=4, keep=6, global_bytes=8, window_bytes=8),
    "full": PageLayout(page=4, keep=0, global_bytes=8, window_bytes=0),
    "window": PageLayout(page=4, keep=9, global_bytes=0, window_bytes=8),
}


@dataclass
class Oracle:
    """Runs plans: notes (in a model of the memory) which text up to which position wrote each slot, and checks."""

    scheduler: Scheduler
    memory: dict[tuple[str, int, int], tuple[int, ...]] = field(default_factory=dict)

    def run(self, step: Sequence[Work]) -> None:
        """In the order of launches, as a device does; it knows by itself a token that the scheduler does not."""
        layout = self.scheduler.pages.layout
        for work in step:
            sequence = work.sequence
            tokens = [*sequence.tokens, sum(sequence.tokens) % 7]
            text = (*tokens[: work.start + work.rows - work.drafts], *sequence.draft[: work.drafts])
            for group, ids in self._groups(sequence.pages):
                first = 0 if group == "global" else max(0, work.start - layout.keep + 1)
                for position in range(first, work.start):
                    found = self.memory.get((group, ids[position // layout.page], position % layout.page))
                    assert found == text[: position + 1], (group, position, found)
                for position in range(work.start, work.start + work.rows):
                    page = ids[position // layout.page]
                    assert page > 0
                    self.memory[group, page, position % layout.page] = text[: position + 1]

    def _groups(self, held: SequencePages) -> list[tuple[str, list[int]]]:
        layout = self.scheduler.pages.layout
        found = [("global", held.globals)] if layout.global_bytes else []
        return found + ([("window", held.windows)] if layout.window_bytes else [])


def serve(
    prompts: list[list[int]], layout: PageLayout, pages: int, *, rows: int, running: int, drafts: int = 0,
    seed: int = 0, prefix_cache: bool = True, answers: int = 5, abort: float = 0.0, ahead: bool = False,
) -> Scheduler:  # fmt: skip
    """Serve everything with a model that answers the sum of the text so far; the oracle watches.

    With ``ahead``, steps follow each other unread wherever they can, as ``Engine.step`` does it.
    """
    chance = random.Random(seed)
    scheduler = Scheduler(
        Pages(layout, pages, pages, prefix_cache), max_running=running, budget=StaticBudget(rows)
    )
    oracle, left = Oracle(scheduler), []
    for i, prompt in enumerate(prompts):
        request = Request(str(i), tuple(prompt), SamplingConfig(), priority=chance.choice((0, 0, 1)))
        left.append(Scheduled(request, list(prompt)))
        scheduler.add(left[-1])
    step: Sequence[Work] = []
    gone: set[int] = set()  # what ended while it was in flight
    for _ in range(10_000):
        if not scheduler.has_work:
            break
        step = [w for w in step if id(w.sequence) not in gone]
        if step and chance.random() < abort:
            victim = chance.choice(step)
            scheduler.remove(victim.sequence)
            step = [w for w in step if w is not victim]
        if not step and scheduler.has_work:
            step = scheduler.plan().work
            assert step, "work is left, and nothing was planned"
            assert rows_of(step) <= max(rows, sum(w.sequence.decoding for w in step))
            oracle.run(step)
        following: list[Work] = []
        if ahead and not drafts and all(w.samples for w in step) and len(step) == len(scheduler.running):
            going = [w for w in step if len(w.sequence.tokens) + 1 < len(w.sequence.request.prompt) + answers]
            following = scheduler.follow(going)
            oracle.run(following)
            scheduler.followed = getattr(scheduler, "followed", 0) + bool(following)
        for work in step:
            sequence = work.sequence
            if not work.samples:
                scheduler.advance(work, work.rows)
                continue
            kept, right = [], work.rows - work.drafts
            for i in range(work.drafts + 1):
                kept.append(sum(sequence.tokens + kept) % 7)
                if i < work.drafts and sequence.draft[i] != kept[-1]:
                    break
            sequence.tokens += kept
            sequence.draft = []
            scheduler.advance(work, right + len(kept) - 1)
            if len(sequence.tokens) - len(sequence.request.prompt) >= answers or chance.random() < abort:
                scheduler.remove(sequence)
                gone.add(id(sequence))
            elif drafts:
                truth = list(sequence.tokens)
                for _ in range(chance.randint(0, drafts)):
                    truth.append(sum(truth) % 7 if chance.random() < 0.7 else 99)
                sequence.draft = truth[len(sequence.tokens) :]
        step = following
        for sequence in scheduler.running:
            held, groups = sequence.pages, [ids for _, ids in oracle._groups(sequence.pages)]
            assert held.reach == layout.page * min(map(len, groups))
            if sequence.computed < held.due:  # nothing to settle
                assert not prefix_cache or sequence.computed < (held.named + 1) * layout.page
                assert not layout.window_bytes or layout.first_needed(sequence.computed) <= held.dropped
        unread = [s for s in (*scheduler.running, *scheduler.waiting) if not s.decoding]
        assert ahead or scheduler.prompt_rows == sum(len(s.tokens) - s.computed for s in unread)
    assert not scheduler.has_work
    assert scheduler.pages.used == 0
    for sequence in left:
        text = list(sequence.request.prompt)
        while len(text) < len(sequence.tokens):
            text.append(sum(text) % 7)
        assert sequence.tokens == text
    return scheduler


@settings(max_examples=120, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 10_000),
    count=st.integers(1, 12),
    pages=st.integers(14, 40),
    rows=st.integers(1, 40),
    running=st.integers(1, 6),
    drafts=st.integers(0, 3),
    prefix_cache=st.booleans(),
    ahead=st.booleans(),
)
def test_every_page_holds_what_its_sequence_needs(
    layout: str, seed: int, count: int, pages: int, rows: int, running: int, drafts: int, prefix_cache: bool,
    ahead: bool,
) -> None:  # fmt: skip
    chance = random.Random(seed)
    stems = [[chance.randrange(50) for _ in range(20)] for _ in range(2)]
    prompts = []
    for _ in range(count):
        stem = chance.choice(stems)[: chance.randint(0, 20)]
        prompts.append([*stem, *(chance.randrange(50) for _ in range(chance.randint(1, 12)))])
    serve(
        prompts, LAYOUTS[layout], pages, rows=rows, running=running, drafts=0 if ahead else drafts, seed=seed,
        prefix_cache=prefix_cache, abort=0.05, answers=9 if ahead else 5, ahead=ahead,
    )  # fmt: skip


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_equal_beginnings_are_computed_once(layout: str) -> None:
    prompts = [[*range(40), 100 + i] for i in range(5)]
    scheduler = serve(prompts, LAYOUTS[layout], 200, rows=16, running=5)
    # The later four wait for the first one's pages and take all ten of them.
    assert scheduler.prefix_hits == 4 * 40
    assert serve(prompts, LAYOUTS[layout], 200, rows=16, running=5, prefix_cache=False).prefix_hits == 0


def test_a_short_cache_preempts_and_still_answers() -> None:
    prompts = [[i, *range(11)] for i in range(6)]
    scheduler = serve(prompts, LAYOUTS["full"], 14, rows=64, running=6, answers=20)
    assert scheduler.preemptions > 0


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_steps_that_follow_unread_ones_write_where_nobody_looks(layout: str) -> None:
    prompts = [[*range(9), 100 + i % 3] for i in range(20)]
    scheduler = serve(prompts, LAYOUTS[layout], 60, rows=64, running=6, answers=40, abort=0.05, ahead=True)
    assert scheduler.followed > 50  # type: ignore[attr-defined]
    assert scheduler.prefix_hits > 0


def test_a_step_follows_only_where_nothing_is_to_be_decided() -> None:
    def running(pages: int, *, waiting: int = 0, most: int = 2) -> tuple[Scheduler, list[Work]]:
        scheduler = Scheduler(Pages(LAYOUTS["full"], pages, 0), max_running=most, budget=StaticBudget(64))
        for i in range(2):
            scheduler.add(Scheduled(Request(str(i), (1, 2, 3)), [1, 2, 3]))
        step = scheduler.plan().work
        assert len(step) == 2
        for i in range(waiting):
            scheduler.add(Scheduled(Request(f"w{i}", (5, 6)), [5, 6]))
        return scheduler, step

    scheduler, step = running(9)
    assert [(w.start, w.rows) for w in scheduler.follow(step)] == [(3, 1), (3, 1)]
    assert scheduler.pages.used == 2  # the fourth position is in the first page
    later = [Work(w.sequence, 3, 1) for w in step]
    assert scheduler.follow(later)
    assert scheduler.pages.used == 4
    scheduler, step = running(3)
    assert not scheduler.follow([Work(w.sequence, 3, 1) for w in step])  # two pages are needed, one is free
    assert scheduler.pages.used == 2
    assert len(scheduler.follow([Work(step[0].sequence, 3, 1)])) == 1  # the other one ends
    scheduler, step = running(9, waiting=1)
    assert scheduler.follow(step)  # no place for another
    assert not scheduler.follow(step[:1])  # there will be one
    scheduler, step = running(9, waiting=1, most=3)
    assert not scheduler.follow(step)
    assert not running(9)[0].follow([])


def test_who_found_no_room_is_not_asked_again_before_there_is_some() -> None:
    scheduler = Scheduler(Pages(LAYOUTS["full"], 9, 0), max_running=4, budget=StaticBudget(64))
    first = Scheduled(Request("a", tuple(range(14))), list(range(14)))
    scheduler.add(first)
    (step,) = scheduler.plan().work
    scheduler.add(Scheduled(Request("b", tuple(range(20, 40))), list(range(20, 40))))
    assert scheduler.admits
    first.tokens.append(3)
    scheduler.advance(step, step.rows)
    assert len(scheduler.plan().work) == 1
    assert not scheduler.admits
    assert scheduler.follow([Work(first, 14, 1)])
    scheduler.remove(first)
    assert scheduler.admits


def test_the_prefix_cache_keeps_what_was_used_last() -> None:
    pool = PagePool(2)
    first, second = pool.take(), pool.take()
    pool.name(first, b"a")
    pool.name(second, b"b")
    pool.release(first)
    pool.release(second)
    pool.share(pool.find(b"a"))
    pool.release(first)
    assert pool.take() == second  # "b" was idle longest
    assert pool.find(b"a") == first
    assert not pool.find(b"b")


def test_decodes_never_wait_for_prompts() -> None:
    scheduler = Scheduler(Pages(LAYOUTS["full"], 99, 0), max_running=8, budget=StaticBudget(8))
    answering = Scheduled(Request("a", (1, 2)), [1, 2])
    scheduler.add(answering)
    (work,) = scheduler.plan().work
    answering.tokens.append(3)
    scheduler.advance(work, work.rows)
    scheduler.add(Scheduled(Request("b", tuple(range(50))), list(range(50))))
    plan = scheduler.plan()
    assert [(w.sequence.request.id, w.rows) for w in plan.work] == [("a", 1), ("b", 7)]


def test_priority_goes_first_and_is_preempted_last() -> None:
    scheduler = Scheduler(Pages(LAYOUTS["full"], 99, 0), max_running=1, budget=StaticBudget(8))
    for name, priority in (("late", 5), ("early", -1)):
        scheduler.add(Scheduled(Request(name, (1, 2), priority=priority), [1, 2]))
    assert [w.sequence.request.id for w in scheduler.plan().work] == ["early"]


def test_bytes_follow_from_the_model() -> None:
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=16, block=8, stride=8)
    config = ModelConfig(layers=3, pattern="FLH", attention=attention)
    layout = PageLayout.of(config, itemsize=4)
    pair = 2 * 2 * 8 * 4  # a key and a value, two heads of eight numbers, four bytes
    assert layout == PageLayout(
        page=32, keep=16, global_bytes=pair * (32 + 4), window_bytes=pair * 32 * 5 // 2
    )
    assert PageLayout.of(ModelConfig(layers=2, pattern="F"), 2).window_bytes == 0
    with pytest.raises(ConfigError, match="multiple of the pooled blocks' stride, 8"):
        PageLayout.of(config, 4, page=20)


def test_memory_is_shared_so_that_one_sequence_always_fits() -> None:
    layout = LAYOUTS["both"]
    globals_, windows = share_memory(layout, 8 * 1000, running=4, step=16, longest=400)
    assert globals_ >= 100
    assert windows >= layout.window_pages(16)
    assert 8 * (globals_ + windows) <= 8 * 1000
    with pytest.raises(ConfigError, match="raise memory_gib"):
        share_memory(layout, 8 * 50, running=4, step=16, longest=400)
