"""Pages and the scheduler against an oracle that writes down what every page really holds."""

import random
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
from deepseek.serve.scheduler import Plan, Scheduled, Scheduler, StaticBudget, rows_of

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

    def run(self, plan: Plan) -> None:
        layout = self.scheduler.pages.layout
        for work in plan.work:
            sequence = work.sequence
            text = (*sequence.tokens[: work.start + work.rows - work.drafts], *sequence.draft[: work.drafts])
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
    seed: int = 0, prefix_cache: bool = True, answers: int = 5, abort: float = 0.0,
) -> Scheduler:  # fmt: skip
    """Serve everything with a model that answers the sum of the text so far; the oracle watches."""
    chance = random.Random(seed)
    scheduler = Scheduler(
        Pages(layout, pages, pages, prefix_cache), max_running=running, budget=StaticBudget(rows)
    )
    oracle, left = Oracle(scheduler), []
    for i, prompt in enumerate(prompts):
        request = Request(str(i), tuple(prompt), SamplingConfig(), priority=chance.choice((0, 0, 1)))
        left.append(Scheduled(request, list(prompt)))
        scheduler.add(left[-1])
    for _ in range(10_000):
        if not scheduler.has_work:
            break
        plan = scheduler.plan()
        assert plan.work, "work is left, and nothing was planned"
        assert rows_of(plan.work) <= max(rows, sum(w.sequence.decoding for w in plan.work))
        oracle.run(plan)
        for work in plan.work:
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
            elif drafts:
                truth = list(sequence.tokens)
                for _ in range(chance.randint(0, drafts)):
                    truth.append(sum(truth) % 7 if chance.random() < 0.7 else 99)
                sequence.draft = truth[len(sequence.tokens) :]
        unread = [s for s in (*scheduler.running, *scheduler.waiting) if not s.decoding]
        assert scheduler.prompt_rows == sum(len(s.tokens) - s.computed for s in unread)
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
)
def test_every_page_holds_what_its_sequence_needs(
    layout: str, seed: int, count: int, pages: int, rows: int, running: int, drafts: int, prefix_cache: bool
) -> None:
    chance = random.Random(seed)
    stems = [[chance.randrange(50) for _ in range(20)] for _ in range(2)]
    prompts = []
    for _ in range(count):
        stem = chance.choice(stems)[: chance.randint(0, 20)]
        prompts.append([*stem, *(chance.randrange(50) for _ in range(chance.randint(1, 12)))])
    serve(
        prompts, LAYOUTS[layout], pages, rows=rows, running=running, drafts=drafts, seed=seed,
        prefix_cache=prefix_cache, abort=0.05,
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
