from __future__ import annotations

import contextlib
from dataclasses import FrozenInstanceError, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.config import configclass, from_dict, load_toml, replace, to_dict, to_toml
from deepseek.errors import ConfigError


@configclass
class MoE:
    experts: int = 8
    top_k: int = 2
    balance: Literal["bias", "loss"] = "bias"

    def check(self) -> None:
        if self.top_k > self.experts:
            raise ConfigError(f"top_k={self.top_k} is more than experts={self.experts}")


@configclass
class Model:
    dim: int
    dropout: float = 0.0
    moe: MoE | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    layers: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    path: Path = Path("runs")
    clip: float | None = 1.0
    seed: int | None = None
    anything: Any = 0
    flag: bool = False


FULL = {
    "dim": 4,
    "dropout": 1,
    "moe": {"experts": 16, "balance": "loss"},
    "betas": [0.8, 0.9],
    "layers": ["L", "H"],
    "weights": {"a": 1},
    "path": "x/y",
    "clip": "none",
    "anything": [1, "a"],
}


def test_from_dict_reads_nested_values_into_the_types_asked_for() -> None:
    model = from_dict(Model, FULL)
    assert model.moe == MoE(experts=16, balance="loss")
    assert (model.dropout, type(model.dropout)) == (1.0, float)
    assert (model.betas, model.layers, model.weights) == ((0.8, 0.9), ("L", "H"), {"a": 1.0})
    assert (model.path, model.clip, model.seed, model.anything) == (Path("x/y"), None, None, [1, "a"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 4, "moe": {"expert": 2}}, r"unknown key 'expert' in moe \(did you mean 'experts'\?\)"),
        ({"dmi": 4}, "unknown key 'dmi' in the top level"),
        ({}, "needs a value for dim"),
        ({"dim": "4"}, "dim must be int, not '4'"),
        ({"dim": True}, "dim must be int, not True"),
        ({"dim": 4.0}, "dim must be int"),
        ({"dim": None}, "dim must be int, not None"),
        ({"dim": 4, "flag": 1}, "flag must be bool"),
        ({"dim": 4, "betas": [0.9]}, "betas must have 2 values, not 1"),
        ({"dim": 4, "betas": 0.9}, "betas must be a list"),
        ({"dim": 4, "layers": ["L", 3]}, r"layers\[1\] must be str"),
        ({"dim": 4, "weights": {"a": "b"}}, r"weights\.a must be float"),
        ({"dim": 4, "weights": [1]}, "weights must be a table"),
        ({"dim": 4, "moe": 3}, "moe must be a table of options"),
        ({"dim": 4, "moe": {"balance": "bais"}}, r"moe.balance is 'bais'; choose one of bias, loss.*'bias'"),
        ({"dim": 4, "moe": {"top_k": 9}}, "moe: top_k=9 is more than experts=8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Model, values)


def test_the_constructor_and_replace_refuse_too() -> None:
    with pytest.raises(ConfigError, match=r"MoE has no option 'expert' \(did you mean 'experts'\?\)"):
        MoE(expert=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="needs a value for dim"):
        Model()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="top_k"):
        replace(MoE(), topk=4)
    with pytest.raises(ConfigError, match="more than experts"):
        replace(MoE(), top_k=9)
    assert replace(MoE(), top_k=3) == MoE(top_k=3)
    with pytest.raises(FrozenInstanceError):
        MoE().top_k = 3  # type: ignore[misc]


def test_toml_round_trip(tmp_path: Path) -> None:
    for values in (FULL, {"dim": 1}):
        model = from_dict(Model, values)
        (tmp_path / "c.toml").write_text(to_toml(model), encoding="utf-8")
        assert from_dict(Model, load_toml(tmp_path / "c.toml")) == model
    assert "seed" not in to_dict(model)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Model,
        dim=st.integers(-(2**63), 2**63 - 1),
        dropout=st.floats(allow_nan=False, allow_infinity=False),
        moe=st.none() | st.builds(MoE, experts=st.integers(2, 99), balance=st.sampled_from(["bias", "loss"])),
        layers=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
        clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        seed=st.none() | st.integers(0, 99),
    )
)
def test_any_config_survives_toml(tmp_path_factory: pytest.TempPathFactory, model: Model) -> None:
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_text(to_toml(model), encoding="utf-8", newline="")
    assert from_dict(Model, load_toml(path)) == model


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text("a = 1")
    with pytest.raises(ConfigError, match=r"no config file .*tinny.toml \(did you mean 'tiny.toml'\?\)"):
        load_toml(tmp_path / "tinny.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path / "tiny.toml" / "x.toml")
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfa = 1")
    assert load_toml(tmp_path / "bom.toml") == {"a": 1}
    for text in (b"a = ", b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"\xff"):
        (tmp_path / "bad.toml").write_bytes(text)
        with pytest.raises(ConfigError, match=r"bad\.toml"):
            load_toml(tmp_path / "bad.toml")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_fuzzed_files_give_a_config_error_or_a_table(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("f") / "f.toml"
    path.write_bytes(raw)
    with contextlib.suppress(ConfigError):
        from_dict(Model, load_toml(path))
