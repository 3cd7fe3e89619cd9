"""Kernels of a package that need not be there: a switch, an import that may fail, a check before they are believed.

An environment variable says on, off, or whatever works. What was found out about a package is told once in the log and
kept: why it cannot be imported, and for each kind of kernel why it cannot be used.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from deepseek.errors import ConfigError, MissingExtraError

log = logging.getLogger(__name__)

MEANINGS = {"": None, "auto": None, "0": False, "1": True}
TOLERANCE = 2e-2  #: relative error of a 16-bit output or gradient at which kernels are not believed


class OptionalKernels:
    """What is known of one package.

    Args:
        name: in messages. instead: what runs without it.
        distribution, extra: what to install, and our extra that does.
        package: the module whose absence means that it is not installed.
        variable: of the environment: 0, 1 or auto.
        load: imports it, and raises what goes wrong.
    """

    def __init__(
        self, name: str, instead: str, distribution: str, extra: str, package: str, variable: str,
        load: Callable[[], object],
    ) -> None:  # fmt: skip
        self.name, self.instead, self.variable = name, instead, variable
        self._distribution, self._extra, self._package, self._load = distribution, extra, package, load
        self._forced: bool | None = None
        self.forget()

    def forget(self) -> None:
        """Look again the next time."""
        self._broken: Exception | None = None
        self._looked = False
        self._failures: dict[Hashable, str] = {}

    @contextmanager
    def forced(self, use: bool) -> Iterator[None]:
        """As if the variable were 1 or 0, inside a ``with`` block: for benchmarks and tests."""
        before, self._forced = self._forced, use
        try:
            yield
        finally:
            self._forced = before

    def asked(self) -> bool | None:
        """What the user asks for: on, off, or ``None`` for whatever works. Raises ``ConfigError`` for other values."""
        if self._forced is not None:
            return self._forced
        value = os.environ.get(self.variable, "")
        if value not in MEANINGS:
            raise ConfigError(f"{self.variable}={value!r} must be 0, 1 or auto")
        return MEANINGS[value]

    def broken(self) -> Exception | None:
        """What importing the package raised; told in the log unless it is simply not there."""
        if not self._looked:
            self._looked = True
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._load()
            except Exception as error:
                # What is kept must not keep its frames: they hold every caller's tensors, a whole first step's.
                error.__cause__ = error.__context__ = None
                self._broken = error.with_traceback(None)
                if not self._missing():
                    log.warning("no %s, %s instead: %r", self.name, self.instead, error)
        return self._broken

    def _missing(self) -> bool:
        error = self._broken
        return isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(self._package)

    def usable(
        self, device: torch.device, refusal: Callable[[], str], kind: Hashable, error: Callable[[], float]
    ) -> bool:
        """Whether kernels of this kind run on ``device``; a first answer may compile them.

        Args:
            refusal: why they are not meant for these inputs, or nothing.
            kind: what ``error`` finds out holds for all inputs of a kind.
            error: the worst relative error on a small problem.

        Raises:
            MissingExtraError, ConfigError: it is switched on, ``device`` is CUDA, and it cannot be had.
        """
        asked = self.asked()
        if device.type != "cuda" or asked is False:
            return False
        if asked and self.broken() is not None and self._missing():
            raise MissingExtraError(self._distribution, self._extra, f"{self.variable}=1")
        why = refusal() or self._failure(kind, error)
        if asked and why:
            raise ConfigError(f"{self.variable}=1, but {why}; unset it, and {self.instead}")
        return not why

    def _failure(self, kind: Hashable, error: Callable[[], float]) -> str:
        """Why kernels of a kind cannot be used, or nothing: found by a small problem, and told in the log."""
        if broken := self.broken():
            return f"{self.name} cannot be imported ({broken!r})"
        if kind not in self._failures:
            self._failures[kind] = why = self._try(error)
            if why:
                log.warning("%s; %s instead, for %s", why, self.instead, kind)
        return self._failures[kind]

    def _try(self, error: Callable[[], float]) -> str:
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                _disable_current_modes(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # the compilers' own, about types they know in another way
                worst = error()
        except Exception as problem:
            return f"{self.name} does not run here ({type(problem).__name__}: {str(problem)[:500]})"
        if worst < TOLERANCE:
            return ""
        return f"{self.name} is off by {worst:.1e} from float64, more than {TOLERANCE}"
