"""A report keeps what it shows, says where it was made, and survives being cut short."""

import json
from pathlib import Path

import pytest
import torch

from deepseek.bench.report import BenchOptions, Report
from deepseek.errors import ConfigError

CPU = torch.device("cpu")


def test_rows_are_kept_as_they_are_and_printed_rounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    report = Report("toy", CPU, {"n": 1}, str(path))
    report.ceiling("matmul, TFLOP/s", 1.23456789)
    report.add(
        "a table", [{"stack": "ours", "tok/s": 123456.789}, {"stack": "theirs", "tok/s": 1.0, "more": 2}]
    )
    report.note("one was skipped")
    told = json.loads(path.read_text())  # written before close: a killed run leaves it
    assert told["tables"]["a table"][0] == {"stack": "ours", "tok/s": 123456.789}
    assert told["ceilings"] == {"matmul, TFLOP/s": 1.23456789}
    assert told["notes"] == ["one was skipped"]
    assert told["options"] == {"n": 1}
    assert told["environment"]["torch"] == torch.__version__
    assert {"device", "date", "command"} <= told["environment"].keys()
    shown = capsys.readouterr().out
    assert "123,457" in shown
    assert "1.235" in shown


def test_json_on_stdout_leaves_the_tables_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("toy", CPU, {}, "-")
    report.add("a table", [{"x": 1}])
    report.close()
    out, err = capsys.readouterr()
    assert json.loads(out)["tables"] == {"a table": [{"x": 1}]}
    assert "a table" in err


def test_a_column_that_every_row_leaves_empty_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Report("toy", CPU).add("t", [{"x": 1, "idle %": None}, {"x": 2, "idle %": None}])
    assert "idle" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_named_as_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"^--device='cuda' is not available"):
        BenchOptions(device="cuda").torch_device


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--json=.*absent"):
        Report("toy", CPU, json_path=str(tmp_path / "absent" / "r.json"))
