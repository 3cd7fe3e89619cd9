"""Where a model's chat template runs: Jinja's sandbox, with a limit on work, on what is made, and on time.

A template is a program that came with the weights. Jinja's ``ImmutableSandboxedEnvironment`` keeps it from Python's
internals and from changing what it was given, not from ``{{ 'x' * 10**10 }}`` or loops without end. So everything that
can repeat or grow is counted: rounds of loops (all their items when they begin), calls, filters, and the size of what
operators, filters and calls return. What has no use in a template and makes much of little is left out.

The environment is the one ``transformers`` gives templates (``trim_blocks``, ``lstrip_blocks``, ``break`` and
``continue``, ``{% generation %}``, ``tojson`` that leaves HTML alone, ``raise_exception``, ``strftime_now``).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from deepseek.errors import MissingExtraError, WeightsError

MOST_STEPS = 200_000  #: rounds of loops, calls and filters of one rendering
MOST_MADE = 128 << 20  #: characters and items that one rendering may make, all together
MOST_SECONDS = 5.0
MOST_DIGITS = 4096  #: bits of a whole number

#: Filters and methods that make much of little, or are slow, and that no template needs.
WITHOUT_FILTERS = (
    "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "striptags", "truncate", "urlize",
    "wordcount", "wordwrap", "xmlattr",
)  # fmt: skip
WITHOUT_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill", "to_bytes"})


class TemplateLimit(Exception):
    """A template wanted more than it may have; the message says of what."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps, self.made, self.until = MOST_STEPS, MOST_MADE, time.monotonic() + MOST_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TemplateLimit(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self.until:
            raise TemplateLimit(f"it takes longer than {MOST_SECONDS:.0f} s")

    def make(self, size: int) -> None:
        """Before something of ``size`` characters or items is made, or after."""
        self.made -= size
        if self.made < 0:
            raise TemplateLimit(f"it makes more than {MOST_MADE} characters")


BUDGET: ContextVar[Budget] = ContextVar("BUDGET")


def _used(value: Any) -> Any:
    """``value``, counted."""
    if isinstance(value, (str, list, tuple, dict, bytes)):
        BUDGET.get().make(len(value))
    elif isinstance(value, int) and value.bit_length() > MOST_DIGITS:
        raise TemplateLimit(f"it makes a number of more than {MOST_DIGITS} bits")
    return value


def _rounds(items: Any) -> Any:
    """What a loop goes over, counted: all at once where it is known how many, else one by one."""
    budget = BUDGET.get()
    if isinstance(items, Sized):
        budget.step(1 + len(items))
        return items
    return _each(items, budget)


def _each(items: Iterable[Any], budget: Budget) -> Iterator[Any]:
    budget.step()
    for item in items:
        budget.step()
        yield item


def _concat(parts: Iterable[str]) -> str:
    """What a block or a macro gave, in one piece."""
    made = "".join(parts)
    BUDGET.get().make(len(made))
    return made


def _narrow_format(form: str, function: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> str:
        wide = re.search(r"\d{4,}|\{[^{}]*\{", form)
        if wide:
            raise TemplateLimit(f"it formats to a width of {wide[0]}")
        return function(*args, **kwargs)

    return narrow


def _joined_size(parts: Any, between: Any) -> tuple[list[Any], int]:
    parts = list(parts)
    return parts, len(str(between)) * len(parts) + sum(len(p) for p in parts if isinstance(p, str))


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * len(new)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    budget = BUDGET.get()
    budget.step()
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                budget.make(len(many) * max(0, times))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MOST_DIGITS:
            raise TemplateLimit(f"it makes a number of more than {MOST_DIGITS} bits")
    elif operator == "%" and isinstance(left, (str, bytes)):
        wide = re.search(r"\*|\d{4,}", str(left))
        if wide:
            raise TemplateLimit(f"it formats to a width of {wide[0]}")


def _check_method(method: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a string's method whose result may be much larger than they are."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, str) and name == "join" and arguments:
        parts, size = _joined_size(arguments[0], owner)
        BUDGET.get().make(size)
        return (parts, *arguments[1:])
    if isinstance(owner, str) and name == "replace" and len(arguments) > 1:
        BUDGET.get().make(_replaced_size(owner, str(arguments[0]), str(arguments[1])))
    return arguments


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    width = len(indent) if isinstance(indent, str) else (indent or 0)
    if width > 16:
        raise TemplateLimit(f"it indents by {width}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class _Dict:
    """``dict(…)`` as a function only."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks that say whether it wants the context
    def counted(*args: Any, **kwargs: Any) -> Any:
        BUDGET.get().step()
        given = [a for a in args if not hasattr(a, "eval_ctx") and not hasattr(a, "autoescape")]
        if name == "replace" and len(given) > 2:
            BUDGET.get().make(_replaced_size(str(given[0]), str(given[1]), str(given[2])))
        if name == "join" and given:
            parts, size = _joined_size(given[0], given[1] if len(given) > 1 else kwargs.get("d", ""))
            BUDGET.get().make(size)
            args = tuple(parts if a is given[0] else a for a in args)
        if name == "indent" and given:
            width = given[1] if len(given) > 1 else kwargs.get("width", 4)
            lines = str(given[0]).count("\n") + 1
            BUDGET.get().make(lines * (len(width) if isinstance(width, str) else int(width)))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _each(result, BUDGET.get())
        return _used(result)

    return counted


@functools.cache
def environment() -> Any:
    """The environment of all templates.

    Raises:
        MissingExtraError: Jinja is not installed.
    """
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.compiler import CodeGenerator
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("jinja2", "serve", "a chat template") from None

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}`` marks what the assistant wrote; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Counted(CodeGenerator):
        """Code in which loops and ``~`` are counted."""

        def visit_For(self, node: Any, frame: Any) -> None:
            node.iter = nodes.Call(nodes.EnvironmentAttribute("rounds"), [node.iter], [], None, None)
            super().visit_For(node, frame)

        def visit_Getitem(self, node: Any, frame: Any) -> None:
            if not isinstance(node.arg, nodes.Slice):
                super().visit_Getitem(node, frame)
                return
            self.write("environment.used(")
            super().visit_Getitem(node, frame)
            self.write(")")

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.used(")
            super().visit_Concat(node, frame)
            self.write(")")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%", "+"})
        code_generator_class = Counted
        rounds, used, concat = staticmethod(_rounds), staticmethod(_used), staticmethod(_concat)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return _used(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, (str, bytes, int)) and attr in WITHOUT_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            made = super().wrap_str_format(value)
            return made and _narrow_format(value.__self__, made)

        def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            BUDGET.get().step()
            args = _check_method(called, args)
            return _used(super().call(context, called, *args, **kwargs))

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    made = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False
    )
    for name in WITHOUT_FILTERS:
        del made.filters[name]
    made.filters["tojson"] = to_json
    made.filters = {name: _counted_filter(name, f) for name, f in made.filters.items()}
    del made.globals["lipsum"]
    made.globals |= {"raise_exception": refuse, "strftime_now": _now, "dict": _Dict()}
    return made


class Program:
    """A compiled template. Raises ``WeightsError`` when it is none."""

    def __init__(self, text: str, where: str) -> None:
        import jinja2

        try:
            self._template = environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise WeightsError(f"{where}, line {error.lineno}: {_line(error)}") from None
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise WeightsError(f"{where} cannot be compiled: {_line(error)}") from None

    def render(self, variables: Mapping[str, Any], most: int) -> str:
        """The text. Raises ``TemplateLimit``, and whatever the template raises; see ``failures``.

        Args:
            most: characters of the whole text.
        """
        token = BUDGET.set(Budget())
        try:
            parts, size = [], 0
            for part in self._template.generate(**variables):
                BUDGET.get().step()
                size += len(part)
                if size > most:
                    raise TemplateLimit(f"its text is longer than {most} characters")
                parts.append(part)
            return "".join(parts)
        finally:
            BUDGET.reset(token)


def failures() -> tuple[type[Exception], ...]:
    """What rendering may raise because of the template or of what it was given."""
    import jinja2

    return (
        TemplateLimit, jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError,
        ArithmeticError, RecursionError, MemoryError, NotImplementedError, AssertionError,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
