"""How the HTTP front end behaves: limits, deadlines, what it logs."""

from __future__ import annotations

from deepseek.config import configclass
from deepseek.errors import ConfigError


@configclass
class ServerConfig:
    """Options of the front end; those of the engine are ``EngineConfig``'s.

    Attributes:
        name: what clients call the model; the model's own name unless told.
        max_running: sequences that the engine runs at once, for the bound of the queue.
        max_waiting: sequences that may wait beyond them; a request that finds the queue full is answered 429.
        max_sequences: prompts × n of one request.
        timeout: seconds a request may take unless it says otherwise (``timeout``); 0: no end.
        drain: seconds that running requests get to finish after SIGTERM.
        max_body: bytes of a request's body; max_bodies: of all that are here at once.
        max_logprobs: log-probabilities, of tokens and their alternatives, in all answers that are not streamed; each
            takes about 350 bytes until its answer is sent.
        body_seconds: for a request's head, and for its body, to arrive.
        keep_alive: seconds that an idle connection is kept.
        stalled: seconds after which a stream whose reader takes nothing is cut.
        beat: seconds of silence on a stream after which a comment is sent, so that proxies keep it.
        long_text: characters from which on tokenising leaves the event loop for a thread.
        log: where the access log goes: '-' (standard error), a file, or '' (nowhere).
    """

    name: str = ""
    max_running: int = 64
    max_waiting: int = 256
    max_sequences: int = 256
    timeout: float = 600.0
    drain: float = 30.0
    max_body: int = 16 << 20
    max_bodies: int = 512 << 20
    max_logprobs: int = 2_000_000
    body_seconds: float = 30.0
    keep_alive: float = 75.0
    stalled: float = 30.0
    beat: float = 10.0
    long_text: int = 2000
    log: str = "-"

    def check(self) -> None:
        if min(self.max_running, self.max_sequences, self.max_body) < 1 or self.max_waiting < 0:
            raise ConfigError(
                f"max_running={self.max_running}, max_sequences={self.max_sequences} and max_body={self.max_body} "
                f"must be at least 1, max_waiting={self.max_waiting} at least 0"
            )
        if self.max_bodies < self.max_body or self.max_logprobs < 1:
            raise ConfigError(
                f"max_bodies={self.max_bodies} must be at least max_body={self.max_body}, "
                f"max_logprobs={self.max_logprobs} at least 1"
            )
        if min(self.timeout, self.drain) < 0 or min(self.body_seconds, self.stalled, self.beat) <= 0:
            raise ConfigError(
                f"timeout={self.timeout} and drain={self.drain} must be at least 0, body_seconds={self.body_seconds}, "
                f"stalled={self.stalled} and beat={self.beat} above 0"
            )
