"""Keys and their limits, with a clock that the test turns."""

from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from deepseek.serve.server.admission import Admission
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.keys import Bucket, Key, KeyConfig, Keyring

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789abc"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_with_time_and_may_be_overdrawn() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.level == 60
    bucket.take(100)
    assert bucket.level == -40
    assert bucket.seconds_until(1) == 41
    clock.now += 41
    assert bucket.level == pytest.approx(1)
    clock.now += 1000
    assert bucket.level == 60


def test_requests_tokens_and_concurrency_are_limited_each() -> None:
    clock = Clock()
    key = Key("a", KeyConfig(key=ALICE, requests_per_minute=2, tokens_per_minute=100, concurrent=3), clock)
    key.enter()
    key.enter()
    with pytest.raises(ApiError, match="2 requests per minute; try again in 30 s") as caught:
        key.enter()
    assert caught.value.status == 429
    assert caught.value.headers["retry-after"] == "30"
    clock.now += 60
    key.spend(150)
    with pytest.raises(ApiError, match="100 tokens per minute; try again in 31 s"):
        key.enter()
    clock.now += 60
    key.enter()
    with pytest.raises(ApiError, match="3 requests of this key are running"):
        key.enter()
    key.leave()
    clock.now += 60
    key.enter()
    assert key.headers()["x-ratelimit-remaining-requests"] == "1"


def test_a_file_and_the_environment_give_keys_together(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of 'test'
    file.write_text(f'[alice]\nkey = "{ALICE}"\nconcurrent = 2\n[old]\nsha256 = "{digest}"\n')
    ring = Keyring.load(
        file, {"DEEPSEEK_API_KEYS": f"bob={BOB}", "DEEPSEEK_ADMIN_KEYS": "sk-admin-0123456789="}
    )
    assert [(k.name, k.admin) for k in ring.keys] == [
        ("alice", False),
        ("old", False),
        ("bob", False),
        ("admin", True),
    ]
    found = ring.find(f"Bearer {BOB}")
    assert found is not None
    assert found.name == "bob"
    assert ring.find("bearer test") is not None
    assert ring.find("Bearer sk-admin-0123456789=") is not None
    for wrong in (
        "",
        "Bearer",
        f"Basic {BOB}",
        BOB,
        f"Bearer {BOB}x",
        f"Bearer {BOB.upper()}",
        "Bearer \udcff",
    ):
        assert ring.find(wrong) is None
    assert BOB not in repr(ring)


def test_a_file_that_changes_is_read_once_it_has_settled(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{ALICE}"\ntokens_per_minute = 100\nconcurrent = 1\n')
    ring = Keyring.load(file, {"DEEPSEEK_API_KEYS": "env=sk-env-0123456789ab"})
    alice = ring.find(f"Bearer {ALICE}")
    assert alice is not None
    alice.enter()
    alice.spend(70)
    file.write_text(f'[alice]\nkey = "{ALICE}"\ntokens_per_minute = 200\n[bob]\nkey = "{BOB}"\n')
    ring.look()
    assert ring.find(f"Bearer {BOB}") is None, "it may be half written"
    ring.look()
    assert ring.find(f"Bearer {BOB}") is not None
    assert ring.find(f"Bearer {ALICE}") is alice
    assert ring.find("Bearer sk-env-0123456789ab") is not None
    assert alice.tokens is not None
    assert alice.tokens.level == pytest.approx(130, abs=1), "what was used stays used"
    assert (alice.running, alice.concurrent) == (1, 0)


def test_a_secret_that_kubernetes_exchanges_is_read(tmp_path: Path) -> None:
    """A mounted secret is a link to a file in a directory, which is a link that is exchanged."""
    for name, key in (("one", ALICE), ("two", BOB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.toml").write_text(f'[alice]\nkey = "{key}"\n')
    data, file = tmp_path / "..data", tmp_path / "keys.toml"
    data.symlink_to("one")
    file.symlink_to("..data/keys.toml")
    ring = Keyring.load(file, {})
    new = tmp_path / "..new"
    new.symlink_to("two")
    new.replace(data)
    for _ in range(2):
        ring.look()
    assert ring.find(f"Bearer {ALICE}") is None
    assert ring.find(f"Bearer {BOB}") is not None


def test_a_file_that_is_no_good_leaves_the_keys_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{ALICE}"\n')
    ring = Keyring.load(file, {})
    before = ring.keys
    for text in ("", "[a", f'[alice]\nkey = "{ALICE}"\n[b]\nkey = "{ALICE}"', "\xff", f'key = "{ALICE}"'):
        file.write_bytes(text.encode("latin-1"))
        for _ in range(4):
            ring.look()
        assert ring.keys is before
    file.unlink()
    for _ in range(4):
        ring.look()
    assert ring.keys is before
    assert len(caplog.messages) == 6, "each is told once"
    assert ALICE not in caplog.text
    file.mkdir()
    ring.read_again()
    assert ring.keys is before
    Keyring().look()
    Keyring().read_again()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ('key = "x"', "must be a table"),
        ('[a]\nkey = "short"', "can be guessed"),
        ("[a]\nconcurrent = 2", "either key = … or sha256"),
        (f'[a]\nkey = "{ALICE}"\nconcurent = 2', "did you mean 'concurrent'"),
        ('[a]\nsha256 = "12"', "64 hexadecimal digits"),
        (f'[a]\nkey = "{ALICE}"\n[b]\nkey = "{ALICE}"', "are the same"),
        (f'["a b"]\nkey = "{ALICE}"', "no name for a key"),
        ('[a]\nkey = "sk with blanks in it"', "without blanks"),
        ("[a", "not valid TOML"),
    ],
)
def test_a_bad_keys_file_is_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Keyring.load(file, {})


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    clock = Clock()
    queue = Admission(2, 3, clock)
    for _ in range(5):
        queue.enter()
    with pytest.raises(ApiError, match="5 sequences are running or waiting, and the queue holds 5") as caught:
        queue.check()
    assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "5")  # nothing known yet
    for _ in range(4):
        clock.now += 2
        queue.leave(1)
        queue.enter()
    with pytest.raises(ApiError) as caught:
        queue.check()
    assert caught.value.headers["retry-after"] == "5"  # 3 ahead, at 4 in 6 s


def test_a_request_larger_than_the_queue_runs_alone() -> None:
    queue = Admission(2, 2)
    queue.enter()
    queue.more(50)
    assert queue.inside == 50
    with pytest.raises(ApiError):
        queue.enter()
    queue.leave(50)
    queue.enter()
    queue.enter()
    with pytest.raises(ApiError, match="1 sequences"):
        queue.more(50)
    assert queue.inside == 2


def test_draining_refuses_and_tells_when_it_is_empty() -> None:
    queue = Admission(2, 2)
    queue.enter()
    queue.draining = True
    queue.more(3)  # it was let in before
    with pytest.raises(ApiError) as caught:
        queue.enter()
    assert caught.value.status == 503
    queue.leave(3)
    assert queue.inside == 0
