"""A file imports its own package or something lower, nothing else.

Every import counts: relative ones, those inside functions, those for type checking only, and
``import_module`` of a literal name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepseek"

#: From the bottom up. Neighbours in one row do not know each other.
LAYERS = [
    {"errors"},
    {"address", "batch", "config", "events", "files", "registry"},
    {"ops", "dist", "autodiff", "math"},
    {"nn"},
    {"models", "data"},
    {"parallel", "precision", "weights"},
    {"assemble"},
    {"train", "serve"},
    {"align", "compress", "monitor", "planner", "cluster", "transformers", "labs"},
    {"recipes", "bench"},
    {"cli", "__main__"},
]
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row}
FRONT_DOOR = "__init__"  #: ``deepseek/__init__.py`` may import anything; only the top may import it
ALLOWED = {("__main__", "cli")}


def part(path: Path, root: Path) -> str:
    """The package or root file that ``path`` belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of ours that a file imports."""
    here = ["deepseek", *path.relative_to(root).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{a.name}" for a in node.names] if module == "deepseek" else [module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            names = [str(node.args[0].value)] if function in ("import_module", "__import__") else []
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "deepseek")


def offences(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        mine = part(path, root)
        where = f"deepseek/{path.relative_to(root).as_posix()}"
        if mine == FRONT_DOOR:
            continue
        if mine not in HEIGHT:
            found.append(f"{where}: '{mine}' has no place in the architecture")
            continue
        for line, name in imported(path, root):
            other = [*name.split("."), FRONT_DOOR][1]
            if other not in HEIGHT:  # `import deepseek`, or a name that only the front door has
                if mine not in LAYERS[-1]:
                    found.append(f"{where}:{line}: imports the front door ({name})")
            elif other != mine and HEIGHT[other] >= HEIGHT[mine] and (mine, other) not in ALLOWED:
                found.append(f"{where}:{line}: '{mine}' may not import '{other}' ({name})")
    return found


def test_every_import_runs_downhill() -> None:
    assert offences(PACKAGE) == []


def test_every_part_of_the_package_is_looked_at() -> None:
    parts = {part(p, PACKAGE) for p in PACKAGE.rglob("*.py")}
    assert {"errors", "config", "weights", FRONT_DOOR} <= parts


@pytest.mark.parametrize(
    ("file", "line", "ok"),
    [
        ("errors.py", "import math", True),
        ("errors.py", "from deepseek.config import x", False),
        ("config.py", "from deepseek.errors import x", True),
        ("config.py", "from .errors import x", True),
        ("config.py", "from . import events", False),
        ("config.py", "from deepseek import errors", True),
        ("config.py", "from deepseek import Engine", False),
        ("ops/attention.py", "from deepseek.dist.mesh import x", False),
        ("math/gelu.py", "import deepseek.ops.attention", False),
        ("nn/moe.py", "from deepseek.ops.experts import x", True),
        ("nn/moe.py", "from .layers import x", True),
        ("nn/moe.py", "from ..models.config import x", False),
        ("nn/moe.py", "from .. import models", False),
        ("nn/deep/er.py", "from ..layers import x", True),
        ("nn/__init__.py", "from .layers import x", True),
        ("nn/__init__.py", "from ..train import x", False),
        ("models/t.py", "from deepseek.data import x", False),
        ("weights/c.py", "from deepseek.parallel.plan import x", False),
        ("weights/c.py", "def f():\n    from deepseek.train import loop", False),
        ("weights/c.py", "if TYPE_CHECKING:\n    import deepseek.train.loop", False),
        ("weights/c.py", "importlib.import_module('deepseek.train.loop')", False),
        ("weights/c.py", "from deepseek.models import x", True),
        ("weights/c.py", "import deepseek", False),
        ("assemble.py", "from deepseek.weights import x", True),
        ("assemble.py", "from deepseek.train import x", False),
        ("weights/c.py", "from deepseek.assemble import x", False),
        ("train/loop.py", "from deepseek.serve.engine import x", False),
        ("serve/engine.py", "from deepseek.train.loop import x", False),
        ("align/rollout.py", "from deepseek.serve.engine import x\nfrom deepseek.train.loop import y", True),
        ("align/rollout.py", "from deepseek.monitor.store import x", False),
        ("monitor/store.py", "from deepseek.planner.cost import x", False),
        ("recipes/sft.py", "from deepseek.align.sft import x", True),
        ("recipes/sft.py", "from deepseek.cli import x", False),
        ("cli/train.py", "import deepseek as ds", True),
        ("cli/train.py", "from deepseek.recipes.pretrain import x", True),
        ("__main__.py", "from deepseek.cli import main", True),
        ("__init__.py", "from deepseek.cli import main", True),
        ("utils.py", "import math", False),
        ("helpers/a.py", "import math", False),
    ],
)
def test_the_check_can_fail(tmp_path: Path, file: str, line: str, ok: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert (offences(tmp_path) == []) == ok
