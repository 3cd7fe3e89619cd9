"""A process in which grammars are tried before the engine compiles them.

llguidance limits its own work well, but not everywhere: a chain of some thousand rules overflows the stack, some
regular expressions take ten seconds and gigabytes before a limit is looked at. Such a grammar must not take the
step process with it. So each new one is compiled, and a short answer drawn from it, in a child first, which has
little stack, little memory and little time; if the child dies of it, the grammar is refused and a new child
started for the next. The child runs this file alone: it imports llguidance and nothing else of size.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

SECONDS = 1.0  #: of processor time for one grammar
PATIENCE = 20.0  #: seconds on the clock, when the machine is busy
MEMORY = 1 << 30  #: bytes of address space, on Linux
STACK = 2 << 20  #: bytes: less than any thread of the engine has
STEPS = 24  #: tokens of the answer drawn


class Trial:
    """The child, started at the first grammar. Not for several threads at once."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = int

    def error(self, source: str, limits: dict[str, Any]) -> str:
        """What is wrong with a grammar in llguidance's form, or the empty string."""
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps([source, limits]).encode() + b"\n")
            child.stdin.flush()
        answer = b""
        if select.select([child.stdout], [], [], PATIENCE)[0]:
            answer = child.stdout.readline()
        if answer.endswith(b"\n"):
            return str(json.loads(answer))
        self._end()
        if child.returncode in (-signal.SIGPROF, -signal.SIGKILL):
            return f"it takes more than {SECONDS:g} s to compile"
        return f"llguidance fails at it (it may be too deep, or need more than {MEMORY >> 30} GiB of memory)"

    def close(self) -> None:
        """End the child."""
        self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(
                [sys.executable, __file__], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
            self._end = weakref.finalize(self, _stop, self._child)
        return self._child


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def _serve() -> None:
    """Read a grammar a line, and say what is wrong with it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import llguidance

    tokens = [bytes([byte]) for byte in range(256)] + [b""]
    table = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(tokens)))
    threading.stack_size(STACK)
    for line in sys.stdin.buffer:
        job = threading.Thread(target=_answer, args=(llguidance, table, *json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        job.start()
        job.join()
        signal.setitimer(signal.ITIMER_PROF, 0)


class _Bytes:
    """A tokenizer of single bytes."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _answer(llguidance: Any, table: Any, source: str, limits: dict[str, Any]) -> None:
    """Say what is wrong with a grammar."""
    try:
        error = _error(llguidance, table, source, limits)
    except Exception as fault:
        error = str(fault) or type(fault).__name__
    sys.stdout.write(json.dumps(error) + "\n")
    sys.stdout.flush()


def _error(llguidance: Any, table: Any, source: str, limits: dict[str, Any]) -> str:
    """Compile it and draw the beginning of an answer: some faults show only then."""
    matcher = llguidance.LLMatcher(table, source, log_level=0, limits=llguidance.LLParserLimits(**limits))
    dice = random.Random(0)
    for _ in range(STEPS):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = [i for i in range(256) if bits >> i & 1]
        if not allowed:
            break
        matcher.consume_token(dice.choice(allowed))
    return str(matcher.get_error())


if __name__ == "__main__":
    sys.path.pop(0)  # this file's directory, which is a package
    _serve()
