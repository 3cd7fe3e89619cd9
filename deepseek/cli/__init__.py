"""``deepseek …``: what a person types. Parsing is tyro's; every command is a dataclass whose ``go`` does it.

A new command is a class in a file of this package and one row of ``COMMANDS``. Heavy packages are imported inside
the commands, so that ``deepseek --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Protocol

import tyro
from tyro.conf import subcommand

from deepseek.cli import bench, route, serve, train, use, watch
from deepseek.errors import ConfigError, DeepseekError, did_you_mean


class Command(Protocol):
    """What a person asked for; its fields are the options, its docstring is the help."""

    def go(self, rest: Sequence[str]) -> int:
        """Do it, with the arguments that are not its own; returns the exit status."""


#: What a person types -> what does it, in the order of ``deepseek --help``.
COMMANDS: dict[str, type[Command]] = {
    "quickstart": train.Quickstart,
    "pretrain": train.Pretrain,
    "resume": train.Resume,
    "generate": use.Generate,
    "chat": use.Chat,
    "serve": serve.Serve,
    "import": use.Import,
    "export": use.Export,
    "evaluate": train.Evaluate,
    "report": watch.Report,
    "inspect": watch.Inspect,
    "runs": watch.Runs,
    "monitor": watch.Monitor,
    "metrics": watch.Metrics,
    "act": watch.Act,
    "replay": watch.Replay,
    "route": route.Route,
    "doctor": bench.Doctor,
    "bench": bench.Bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every ``DeepseekError`` into one line on stderr. Returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        from deepseek import __version__

        print(f"deepseek-framework {__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    names = list(COMMANDS)
    if args and not args[0].startswith("-") and args[0] not in names:
        print(
            f"error: no command {args[0]!r}{did_you_mean(args[0], names)}; there are: {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    try:
        if args[:1] == ["bench"] and len(args) > 1 and not args[1].startswith("-"):
            return bench.Bench(args[1]).go(args[2:])  # each benchmark has options, and a --help, of its own
        parsed, rest = tyro.cli(
            _parsed_by_tyro(), args=args or ["--help"], prog="deepseek", return_unknown_args=True,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
        if rest and not isinstance(parsed, (train.Pretrain, train.Resume)):
            raise ConfigError(f"unknown option {rest[0]!r}; see `deepseek {args[0]} --help`")
        _check_lists(parsed, args)
        return parsed.go(rest)
    except DeepseekError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing is wrong
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _check_lists(parsed: Any, args: Sequence[str]) -> None:
    """Raises ``ConfigError`` where an option that takes several values is given twice: the first would be dropped."""
    for field in dataclasses.fields(parsed):
        option = f"--{field.name.replace('_', '-')}"
        times = sum(a.partition("=")[0].replace("_", "-") == option for a in args)
        if times > 1 and isinstance(getattr(parsed, field.name), tuple):
            raise ConfigError(
                f"{option} is given {times} times; give all of its values after one: {option} A B"
            )


def _parsed_by_tyro() -> Any:
    """The union of all commands, each under its name."""
    return reduce(or_, (Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items()))


__all__ = ["COMMANDS", "Command", "main"]
