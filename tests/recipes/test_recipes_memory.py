"""A run that recomputes activations ends with the weights of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_runs import identical, largest_difference, smallest, tensors, write_corpus

from deepseek.recipes.pretrain import pretrain


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
