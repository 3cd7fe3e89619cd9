"""A run that recomputes activations ends with the weights of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import identical, largest_difference, smallest, tensors, write_corpus

from deepseek.recipes.pretrain import derive, pretrain

# Dynamo looks at `.grad` of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("memory") / "corpus")


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Path:
    run = corpus.parent / "plain"
    pretrain(smallest(corpus, train={"steps": 3}), run)
    return run


@pytest.mark.parametrize("mode", ["sqrt", "selective", "budget=0.8", "optimal"])
def test_the_same_weights_bit_for_bit(corpus: Path, plain: Path, mode: str) -> None:
    run = corpus.parent / mode
    pretrain(smallest(corpus, train={"steps": 3, "activation_checkpoint": mode}), run)
    assert identical(tensors(run), tensors(plain))


def test_more_rows_fit_when_less_is_kept(corpus: Path) -> None:
    options = {"micro_rows": 0, "batch_tokens": 512 * 32, "memory_budget": 0.01}
    rows = {
        mode: derive(smallest(corpus, model={"layers": 16}, train={**options, "activation_checkpoint": mode}))
        for mode in ("none", "selective", "sqrt")
    }
    none, selective, sqrt = (rows[m].config.train.micro_rows for m in ("none", "selective", "sqrt"))
    assert none <= selective <= sqrt
    assert none < sqrt <= 16 * none


@pytest.mark.slow
def test_compiled_blocks_are_recomputed_too(
    corpus: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.ops import jit

    def quickly(*args: object, **options: object) -> object:
        return jit.compile_blocks(*args, backend="aot_eager", **options)  # type: ignore[arg-type]

    monkeypatch.setattr("deepseek.recipes.pretrain.compile_blocks", quickly)
    run = corpus.parent / "compiled"
    pretrain(smallest(corpus, train={"steps": 3, "activation_checkpoint": "sqrt", "compile": True}), run)
    assert largest_difference(tensors(run), tensors(plain)) < 1e-5
