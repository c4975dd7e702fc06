"""What is known of the annotators' agreement is shown with a reward model's accuracy, everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
from logged import lines as metrics_of
from reward_runs import config
from typer.testing import CliRunner

from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset
from rlhf.reward.agreement import Agreement
from rlhf.reward.metrics import ScoredRanking, metric_rows, reward_metrics
from rlhf.runs.run import read_run
from stages import reward
from stages.cli import app

KNOWN = {"ceiling": 0.83, "interval": [0.8, 0.86], "pairs": 120, "annotators": 4, "agreement": 0.71}
FIGURES = {"annotator_agreement": 0.71, "ceiling": 0.83, "ceiling_interval": [0.8, 0.86]}
PEOPLE = "(annotators agree 0.71; ceiling 0.83, 0.80 to 0.86)"


def dataset(path: Path, agreement: Any, count: int = 12, held_out: int = 8) -> str:
    """A dataset whose manifest notes this agreement."""
    made = tiny.write_rankings(path, count, held_out)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"agreement": agreement}))
    return made


def test_the_figures_of_a_manifest_are_read(tmp_path: Path) -> None:
    found = Agreement.of([open_dataset(dataset(tmp_path / "data", KNOWN))])
    assert found == Agreement(0.71, 0.83, (0.8, 0.86))
    assert found.metrics() == FIGURES
    assert found.compared_with(0.744) == f"accuracy 0.74 {PEOPLE}"
    assert found.compared_with(None) == f"accuracy - {PEOPLE}"


def test_nothing_is_known_without_a_note_or_of_several_datasets(tmp_path: Path) -> None:
    known, none = (open_dataset(dataset(tmp_path / str(i), note)) for i, note in enumerate((KNOWN, None)))
    without = open_dataset(tiny.write_rankings(tmp_path / "without", 8))
    assert [Agreement.of(some) for some in ([none], [without], [known, known], [])] == [None] * 4


@pytest.mark.parametrize("note", [{"ceiling": 0.8}, KNOWN | {"interval": 0.8}, KNOWN | {"ceiling": "high"}, [1], 0.8])
def test_a_damaged_note_is_told_with_the_remedy(note: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`agreement` is damaged(.|\n)*rlhf data check"):
        Agreement.of([open_dataset(dataset(tmp_path / "data", note))])


def test_the_table_of_figures_has_the_ceiling_below_the_accuracy() -> None:
    metrics = reward_metrics([ScoredRanking((1, 2), (1.0, 0.0), (1, 1))])
    assert not [row for row in metric_rows(metrics)[0][2] if "ceiling" in row[0]]
    rows = [row[:2] for row in metric_rows(metrics | FIGURES)[0][2]]
    assert rows[2][0] == "accuracy" and rows[5:9] == [
        ("annotators agree", 0.71), ("ceiling for accuracy", 0.83), ("  95% interval, low", 0.8),
        ("  95% interval, high", 0.86),
    ]  # fmt: skip


def test_the_reward_stage_says_it_wherever_it_says_the_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, dataset(tmp_path / "data", KNOWN))
    reward.run(made)
    printed, info = capsys.readouterr().out, read_run(made.run)
    assert f"accuracy {info['metrics']['accuracy']:.2f} {PEOPLE}" in printed
    assert "ceiling for accuracy" in printed and "ceiling 0.83" in printed.split("held out:")[1].splitlines()[0]
    assert info["metrics"].items() >= FIGURES.items()
    assert json.loads((Path(made.run) / "reward_metrics.json").read_text()).items() >= FIGURES.items()
    assert {row["eval/ceiling"] for row in metrics_of(made.run) if "eval/loss" in row} == {0.83}


def test_it_goes_into_the_model_card(tmp_path: Path) -> None:
    run = finished.reward(tmp_path / "run")
    info = read_run(run)
    (Path(run) / "run.json").write_text(json.dumps(info | {"metrics": {"accuracy": 0.74, **FIGURES}}))
    result = CliRunner().invoke(app, ["export", run, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| reward | accuracy | 0.74 |" in card and "| reward | ceiling | 0.83 |" in card
    assert "| reward | annotator_agreement | 0.71 |" in card


@pytest.mark.parametrize(("note", "expected"), [(KNOWN | {"ceiling": 0.9}, 0.9), (None, None)])
def test_it_is_that_of_the_dataset_that_is_measured_on(note: Any, expected: float | None, tmp_path: Path) -> None:
    train = dataset(tmp_path / "train", KNOWN, 12, 0)
    held_out = dataset(tmp_path / "held-out", note, 30, 8)  # of which the last 8 are not for training
    made = config(tmp_path, {"train": train, "eval": held_out})
    reward.run(made)
    assert read_run(made.run)["metrics"].get("ceiling") == expected


def test_evaluate_says_it_too(tmp_path: Path) -> None:
    run = finished.reward(tmp_path / "run")
    words = ["evaluate", run, "--dataset", dataset(tmp_path / "data", KNOWN), "--split", "eval", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    [facts] = json.loads(result.stdout.splitlines()[-1])["datasets"]
    assert facts["agreement"].items() >= FIGURES.items()
    assert "83.0%" in result.stdout and "80.0% to 86.0%" in result.stdout
