import pickle

import pytest

from deepseek import errors
from deepseek.errors import DeepseekError, MissingExtraError, did_you_mean


def test_every_error_is_caught_by_the_base_and_listed_in_the_tree() -> None:
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) >= 8
    for kind in kinds:
        assert issubclass(kind, DeepseekError)
        assert kind.__name__ in (errors.__doc__ or "")


def test_errors_are_also_the_builtin_a_stranger_would_catch() -> None:
    with pytest.raises(OSError):
        raise errors.CheckpointError("x")
    with pytest.raises(ImportError, match=r"deepseek-framework\[serve\]"):
        raise MissingExtraError("starlette", "serve", "the server")


@pytest.mark.parametrize("error", [errors.CheckpointError("a"), MissingExtraError("p", "e", "this")])
def test_errors_survive_the_way_back_from_a_worker_process(error: DeepseekError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_did_you_mean() -> None:
    assert did_you_mean("expert", ["experts", "top_k"]) == " (did you mean 'experts'?)"
    assert did_you_mean("zzz", ["experts"]) == ""
    assert did_you_mean("x", []) == ""
