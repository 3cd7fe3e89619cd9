"""Alerts: incidents as JSON to a webhook or to a command, while training goes on.

A sink hears 'incident' events and hands them to a ``Courier``, whose thread delivers them: with a timeout, again after
a failure, and never more than the person at the other end can read. Training only ever appends to a short list.

The JSON is the incident (see ``monitor.incident``) without its gradient map, with these fields beside it:

    {"version": 1, "type": "incident", "text": "…one line…", "run": "name", "directory": "/path", "host": "…",
     "time": Unix seconds, "suppressed": incidents not sent since the last alert, …}

The text of samples stays on the machine unless ``samples=True``: a training corpus is not for a chat room.
"""

from __future__ import annotations

import http.client
import json
import math
import shlex
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deepseek.errors import ConfigError, DeepseekError
from deepseek.events import Event, Sink, emit, plain
from deepseek.monitor.units import one_line

SEVERITIES = ("info", "warning", "critical")
PENDING = 100  #: alerts that wait for a slow receiver; more push the oldest out
TRIES = 5
LONGEST_WAIT = 60.0  #: seconds between two tries
QUIET = 300.0  #: seconds in which the same kind of incident is told once, unless it becomes more severe
BURST, PER_HOUR = 6, 30  #: alerts at once, and in the long run


class DeliveryError(DeepseekError):
    """An alert did not arrive. ``again``: whether another try makes sense; ``wait``: seconds that it should wait."""

    def __init__(self, message: str, *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait = again, wait


class Receiver(ABC):
    """Where alerts go. ``send`` raises ``DeliveryError``."""

    @abstractmethod
    def send(self, data: bytes) -> None: ...


class Webhook(Receiver):
    """Posts to ``url``, which its owner gave; redirects are not followed, certificates are checked.

    Raises:
        ConfigError: ``url`` is no http(s) address.
    """

    def __init__(self, url: str, *, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"a webhook must be an http:// or https:// address, not {url[:60]!r}")
        self.url, self.timeout = url, timeout
        self.name = f"webhook at {parts.hostname}"  # the rest of the address may be a secret
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, data: bytes) -> None:
        headers = {"content-type": "application/json", "user-agent": "deepseek-monitor"}
        request = urllib.request.Request(self.url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                answer.read(1024)
        except urllib.error.HTTPError as error:
            with error:
                again = error.code in (408, 425, 429) or error.code >= 500
                wait = _seconds(error.headers.get("retry-after"))
                raise DeliveryError(f"{self.name} answered {error.code}", again=again, wait=wait) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise DeliveryError(f"{self.name}: {one_line(reason)}") from None


class Command(Receiver):
    """Runs a program with the alert on its standard input. No shell: ``command`` is split into words.

    Raises:
        ConfigError: ``command`` cannot be split, or is empty.
    """

    def __init__(self, command: str | Sequence[str], *, timeout: float = 30.0) -> None:
        try:
            self.words = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise ConfigError(f"the alert command {command!r} cannot be read: {error}") from None
        if not self.words:
            raise ConfigError("the alert command is empty")
        self.name, self.timeout = f"command {self.words[0]}", timeout

    def send(self, data: bytes) -> None:
        try:
            done = subprocess.run(
                self.words, input=data, timeout=self.timeout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                check=False, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DeliveryError(
                f"{self.name} took more than {self.timeout:g} s and was ended", again=False
            ) from None
        except OSError as error:
            raise DeliveryError(f"{self.name}: {error.strerror or error}", again=False) from None
        if done.returncode:
            said = one_line(done.stderr.decode(errors="replace").strip())
            raise DeliveryError(f"{self.name} ended with {done.returncode}: {said}")


class Courier:
    """Delivers payloads to every receiver from a thread of its own; ``offer`` never waits.

    Args:
        first_wait: seconds after the first failure; doubled after each, up to a minute.
        failed: told why, when an alert is given up.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        *,
        first_wait: float = 1.0,
        failed: Callable[[str], None] | None = None,
    ) -> None:
        self.receivers, self.first_wait = list(receivers), first_wait
        self.delivered, self.lost = 0, 0
        self._failed = failed or (lambda text: None)
        self._pending: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closing, self._busy = False, False
        self._give_up = threading.Event()
        self._thread: threading.Thread | None = None

    def offer(self, payload: dict[str, Any]) -> None:
        """Take ``payload`` for delivery."""
        data = json.dumps(payload, default=str, ensure_ascii=False).encode("utf-8", "replace")
        with self._changed:
            if self._closing:
                return
            if len(self._pending) >= PENDING:
                self._pending.popleft()
                self.lost += 1
            self._pending.append(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deepseek-alerts", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, patience: float = 5.0) -> None:
        """Wait up to ``patience`` seconds for what is on its way; what cannot be delivered by then is dropped."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._busy, patience)
            self._closing = True
            self._give_up.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(0.5)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending or self._give_up.is_set():
                    return
                data, self._busy = self._pending.popleft(), True
            try:
                for receiver in self.receivers:
                    self._deliver(receiver, data)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _deliver(self, receiver: Receiver, data: bytes) -> None:
        wait = self.first_wait
        for attempt in range(1, TRIES + 1):
            try:
                receiver.send(data)
                self.delivered += 1
                return
            except DeliveryError as error:
                if not error.again or attempt == TRIES or self._give_up.is_set():
                    self._failed(f"an alert was not delivered: {error}")
                    self.lost += 1
                    return
                self._give_up.wait(min(max(wait, error.wait), LONGEST_WAIT))
                wait *= 2


class Limit:
    """Lets through what a person can read: a kind once in ``quiet`` seconds, and ``burst`` + ``per_hour`` in all.

    A more severe incident of the same kind is news. ``suppressed`` counts what was held back since the last one.
    """

    def __init__(
        self,
        *,
        quiet: float = QUIET,
        burst: int = BURST,
        per_hour: float = PER_HOUR,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.burst, self.rate, self.clock = quiet, burst, per_hour / 3600, clock
        self.suppressed = 0
        self._tokens, self._filled = float(burst), clock()
        self._told: dict[str, tuple[float, int]] = {}

    def passes(self, kind: str, severity: int) -> bool:
        now = self.clock()
        self._tokens, self._filled = min(self.burst, self._tokens + (now - self._filled) * self.rate), now
        when, before = self._told.get(kind, (-math.inf, -1))
        known = now - when < self.quiet and severity <= before
        if known or self._tokens < 1:
            self.suppressed += 1
            return False
        self._tokens -= 1
        self._told[kind] = (now, severity)
        return True


class AlertSink(Sink):
    """Tells receivers about the incidents of a run.

    Args:
        run: its directory.
        receivers: who is told.
        severity: the least severity that is told: 'info', 'warning' or 'critical'.
        samples: whether the text of a batch's samples may leave the machine.
        page: address of the run's dashboard, if there is one.
    """

    def __init__(
        self,
        run: Path,
        receivers: Sequence[Receiver],
        *,
        severity: str = "warning",
        samples: bool = False,
        page: str = "",
        limit: Limit | None = None,
    ) -> None:
        if severity not in SEVERITIES:
            raise ConfigError(f"severity {severity!r} is not known; there are {', '.join(SEVERITIES)}")
        self.run, self.least, self.samples, self.page = run, SEVERITIES.index(severity), samples, page
        self.limit = limit or Limit()
        self._failures: deque[str] = deque(maxlen=4)
        self.courier = Courier(receivers, failed=self._failures.append)

    def write(self, event: Event) -> None:
        self._tell_failures(event.step)
        if event.name != "incident":
            return
        incident = {str(key): plain(value) for key, value in event.values.items()}
        level = severity_level(incident.get("severity"))
        if level < self.least or not self.limit.passes(str(incident.get("kind")), level):
            return
        self.courier.offer(self.payload(incident, event.step, event.time))
        self.limit.suppressed = 0

    def payload(self, incident: dict[str, Any], step: int | None, when: float) -> dict[str, Any]:
        """What is sent about ``incident``."""
        hidden = {"gradient_map"} if self.samples else {"gradient_map", "samples"}
        directory = self.run.resolve()
        about = {
            "version": 1, "type": "incident", "text": headline(incident, directory.name), "run": directory.name,
            "directory": str(directory), "host": socket.gethostname(), "time": when,
            "suppressed": self.limit.suppressed, **({"page": self.page} if self.page else {}),
        }  # fmt: skip
        return {"step": step, **{k: v for k, v in incident.items() if k not in hidden}, **about}

    def _tell_failures(self, step: int | None) -> None:
        """From the caller's thread: the courier's must not wait for other sinks."""
        while self._failures:
            emit("warning", step, text=self._failures.popleft())

    def close(self) -> None:
        self.courier.close()
        self._tell_failures(None)


def receivers_of(webhook: str = "", command: str = "") -> list[Receiver]:
    """A receiver for each that is given. Raises ``ConfigError``."""
    found: list[Receiver] = [Webhook(webhook)] if webhook else []
    return [*found, Command(command)] if command else found


def headline(incident: dict[str, Any], run: str) -> str:
    """``[critical] mine, step 4,120: Loss spike (DATA, 92%)``: one line for a chat room or a pager."""
    step, confidence = incident.get("step"), incident.get("confidence")
    where = f"{run}, step {step:,}" if isinstance(step, int) else run
    sure = f", {confidence:.0%}" if isinstance(confidence, (int, float)) and confidence == confidence else ""
    verdict = f" ({incident['verdict']}{sure})" if incident.get("verdict") else ""
    title = incident.get("title") or incident.get("kind") or "incident"
    return one_line(f"[{incident.get('severity', 'warning')}] {where}: {title}{verdict}")


def severity_level(severity: Any) -> int:
    """0, 1 or 2; what is not known counts as a warning."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else 1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # the address is the user's choice; another one would not be


def _seconds(text: str | None) -> float:
    try:
        found = float(text or 0)
    except ValueError:  # a date: the usual waiting will do
        return 0.0
    return found if math.isfinite(found) and found > 0 else 0.0
