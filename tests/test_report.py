"""`rlhf report`: one page that says what happened, loads nothing, runs nothing that a run wrote, and keeps secrets."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_runs import HOSTILE, sample, write_chain, write_run
from typer.testing import CliRunner

from rlhf.core.errors import UserError
from rlhf.inference.best_of import best_of_kl
from rlhf.report import facts
from rlhf.report.answers import before_and_after, shown
from rlhf.report.charts import thinned
from rlhf.report.frontier import frontier
from rlhf.report.gather import Answer, gather, located
from rlhf.report.headline import gain_of, headline
from rlhf.report.page import _stages as stages_of
from rlhf.report.page import render
from rlhf.report.watch import LivePage
from stages.cli import app


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("report") / "mine")


@pytest.fixture(scope="module")
def page(chain: Path) -> str:
    return render(gather([chain]))


def test_a_run_brings_the_runs_that_it_was_made_from(chain):
    assert [[run.stage for run in one.runs] for one in gather([chain / "ppo"])] == [["sft", "reward", "ppo"]]
    assert [[run.stage for run in one.runs] for one in gather([chain])] == [["sft", "reward", "ppo"]]
    assert gather([chain])[0].last.parameters == 17


def test_runs_that_name_each_other_as_parents_do_not_make_a_ring(tmp_path):
    for name, other in ("ab", "ba"):
        write_run(tmp_path / name, "sft", [], parents=[{"path": str(tmp_path / other)}])
    assert [run.path.name for run in gather([tmp_path / "a"])[0].runs] == ["b", "a"]


def test_runs_that_were_moved_find_their_parents(tmp_path, chain):
    moved = tmp_path / "elsewhere"
    chain.rename(moved)
    try:
        assert [run.stage for run in gather([moved / "ppo"])[0].runs] == ["sft", "reward", "ppo"]
        assert located("runs/gone/base", moved / "ppo") is None
    finally:
        moved.rename(chain)


def test_the_headline_says_in_three_sentences_what_happened(chain):
    found = headline(gather([chain])[0])
    assert found.verdict == "It worked, by its own reward; the doctor warns: identical-completions"
    assert found.tone == "look"
    what, judge, outcome = found.sentences
    assert "17 weights" in what and "demonstrations (3 steps), then trained by PPO (4 updates" in what
    assert "70.0% of 1,000 held-out pairs" in judge and "65.0% to 75.0%" in judge and "55.0%" in judge
    assert "from 0.95 to 1.95 (+1.00" in outcome and "100.0% of the changed answers" in outcome and "2 nats" in outcome


@pytest.mark.parametrize(
    ("changes", "verdict"), [([1.0] * 20, "better"), ([-1.0] * 20, "worse"), ([1.0, -1.0] * 10, "no measurable change")]
)
def test_the_verdict_follows_the_interval(changes, verdict):
    first = [Answer(str(n), "", "a", 0.5, True, None) for n in range(20)]
    last = [Answer(str(n), "", "b", 0.5 + change, True, None) for n, change in enumerate(changes)]
    found = gain_of(first, last)
    assert found is not None and found.verdict == verdict
    assert found.difference == pytest.approx(np.mean(changes)) and found.win_rate == sum(c > 0 for c in changes) / sum(
        c != 0 for c in changes
    )
    assert gain_of(first, last[1:]) is None  # other prompts


def test_a_stopped_run_and_a_run_with_errors_do_not_say_that_they_worked(tmp_path):
    folder = write_chain(tmp_path / "mine")
    info = json.loads((folder / "ppo/run.json").read_text())
    (folder / "ppo/run.json").write_text(json.dumps(info | {"status": "running"}))
    found = headline(gather([folder])[0])
    assert (found.verdict, found.tone) == ("Stopped: PPO is at step 4", "bad")
    (folder / "ppo/run.json").write_text(json.dumps(info))
    with open(folder / "ppo/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "objective/entropy": NaN}\n')
    assert "the doctor found 1 error" in headline(gather([folder])[0]).verdict


def test_the_page_loads_nothing_and_allows_only_its_own_script(page):
    found = Tags(page)
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe", "object", "embed", "form")]
    outer = {(tag, key, value) for tag, attributes in found.tags for key, value in attributes.items()
             if key in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#")}  # fmt: skip
    assert not outer
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "connect-src" not in policy
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 1
    assert len(page) < 1_500_000


def test_everything_has_its_place_on_the_page(page):
    for words in (
        "It worked, by its own reward",
        "Score against KL",
        "Accuracy by annotator",
        " checks, nothing wrong",
        "1,000 pairs",
    ):
        assert words in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {"result", "answers", "frontier", "curves", "reward", "data", "doctor", "lineage", "cost"} <= set(ids)
    for target in re.findall(r'href="#([\w-]+)"', page):
        assert target in ids


def test_texts_of_users_are_shown_and_never_run(tmp_path):
    page = render(gather([write_chain(tmp_path / "mine", HOSTILE)]))
    found = Tags(page)
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 1
    assert not [
        tag for tag, attributes in found.tags if tag == "img" or any(key.startswith("on") for key in attributes)
    ]
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page and "\x1b" not in page


def test_secrets_never_reach_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "from-the-environment-1")
    config = {
        "updates": 4, "reward": {"url": "https://me:password1@host/v1", "api_key": "in-the-config-1"},
        "note": "hf_" + "a" * 30, "rollout": {"max_new_tokens": 77},
    }  # fmt: skip
    page = render(gather([write_chain(tmp_path / "mine", "from-the-environment-1", config=config)]))
    for secret in ("password1", "in-the-config-1", "hf_aaaa", "from-the-environment-1"):
        assert secret not in page
    assert "max_new_tokens: 77" in page and facts.HIDDEN in page


def test_what_the_guard_said_is_shown(tmp_path):
    folder = write_chain(tmp_path / "mine")
    alarm = {"event": "guard", "step": 3, "rule": "gold-falls", "what": HOSTILE, "since": 2, "action": "warn"}
    (folder / "ppo/events.jsonl").write_text(json.dumps(alarm) + "\n{cut off")
    assert "What the guard says" not in render(gather([folder / "sft"]))
    with open(folder / "ppo/metrics.jsonl", "a") as file:
        for step in range(5, 30):
            row = {"step": step, "objective/kl": step / 4, "objective/scores": step, "objective/gold_reward": 9 - step}
            row |= {"objective/scores_std": 1.0, "objective/kl_k3": step / 4, "rollout/response_length": 9.0}
            file.write(json.dumps(row) + "\n")
    page = render(gather([folder]))
    assert "update 3: gold-falls" in page and "Action: warn" in page and "Gold reward and score" in page
    assert len([tag for tag, _ in Tags(page).tags if tag == "script"]) == 1


def test_an_evaluation_in_the_reward_run_is_drawn_and_other_files_are_not(tmp_path):
    folder = write_chain(tmp_path / "mine")
    value = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 9}
    bins = [{**value, "confidence": 0.6, "count": 4}, {**value, "confidence": 0.9, "count": 5}]
    pairs = {"accuracy": value, "baselines": [{**value, "name": HOSTILE}], "calibration": {"reliability": bins}}
    card = {"dataset": HOSTILE, "agreement": None, "pairs": pairs}
    (folder / "reward/test.json").write_text(json.dumps({"datasets": [card]}))
    (folder / "reward/other.json").write_text('{"datasets": [{"pairs": 3}, 4]}')
    (folder / "reward/broken.json").write_text("{")
    for number in range(9):  # however many files of others come after it
        (folder / f"reward/z{number}.json").write_text("{}")
    page = render(gather([folder]))
    assert "The model, simple rules" in page and "Calibration" in page and "other.json" not in page
    assert len([tag for tag, _ in Tags(page).tags if tag == "script"]) == 1


def test_best_of_n_is_drawn_on_the_axes_of_score_against_kl(tmp_path):
    folder = write_chain(tmp_path / "mine")
    points = [{"n": n, "kl": best_of_kl(n), "score": n / 8, "low": 0, "high": 1} for n in (1, 2, 4)]
    facts = {"policy": HOSTILE, "reward": "runs/reward", "prompts": 30}
    (folder / "ppo/best.json").write_text(json.dumps({"best_of": points, **facts}))
    for name, other in (("broken", "{"), ("list", "[1]"), ("words", '{"best_of": [{"n": "many"}, {}]}'),
                        ("z-endless", '{"best_of": [{"n": 1, "kl": 0, "score": Infinity}]}')):  # fmt: skip
        (folder / f"ppo/{name}.json").write_text(other)
    drawn = frontier(gather([folder]))
    assert [line["name"] for line in drawn.points["lines"]] == ["updates", "held out", "best of n"]
    assert drawn.points["lines"][2]["xs"] == pytest.approx([0, 0.6931 - 0.5, 1.3863 - 0.75], abs=1e-4)
    page = render(gather([folder]))
    assert "n from 1 to 4 answers of &lt;/script&gt;" in page and "to 30 prompts by runs/reward" in page
    assert len([tag for tag, _ in Tags(page).tags if tag == "script"]) == 1
    names = [line["name"] for line in frontier(gather([folder, write_chain(tmp_path / "two")])).points["lines"]]
    assert "mine, best of n" in names and "two, best of n" not in names


def test_an_evaluation_in_the_policys_run_is_shown_in_words_and_drawn(tmp_path):
    folder = write_chain(tmp_path / "mine")
    one = {"win_rate": 0.75, "interval": [0.6, 0.9], "wins": 3, "ties": 0, "losses": 1, "length_controlled": 0.7,
           "length_controlled_interval": [0.5, 0.8], "mean_lengths": [9, 7]}  # fmt: skip
    result = {"model": HOSTILE, "dataset": HOSTILE, "policy": {}, "against": {"model": "runs/sft"}, "comparison": one}
    (folder / "ppo/test.json").write_text(json.dumps(result))
    (folder / "ppo/other.json").write_text('{"comparison": 3}')
    page = render(gather([folder]))
    assert "<h2>Is the policy better?</h2>" in page and "against runs/sft: 75.0%" in page
    assert "Win rates: against runs/sft 75.0%" in page and "other.json" not in page
    assert len([tag for tag, _ in Tags(page).tags if tag == "script"]) == 1
    assert "Is the policy better?" not in render(gather([folder / "sft"]))


def test_names_in_a_legend_are_short_and_long_ones_have_rows_of_their_own(tmp_path):
    chains = [write_chain(tmp_path / f"a-long-name-of-an-experiment-{n}") for n in range(4)]
    charts = {chart.title: chart for _, found in stages_of(gather(chains)) for chart in found}
    heights = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', charts[name].svg)[1]) for name in ("Loss", "Score")]
    assert heights[1] > heights[0], "eight lines need more room than four"


def write_pipeline(folder: Path, runs: Path) -> Path:
    """A pipeline file whose stages are those of a chain of runs."""
    stages = {
        "sft": {"data": {"train": "d"}}, "reward": {"data": {"train": "r"}},
        "ppo": {"data": {"prompts": "p"}, "updates": 1, "reward": {"name": "model", "path": "r"}},
    }  # fmt: skip
    for stage, values in stages.items():
        values |= {"run": str(runs / stage), "model": {"path": "m"}}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    names = {stage: str(folder / f"{stage}.yaml") for stage in stages}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"name": "my pipeline", **names}))
    return folder / "pipeline.yaml"


def test_a_pipeline_file_means_its_runs_that_have_begun(tmp_path):
    runs = tmp_path / "runs"
    file = write_pipeline(tmp_path, runs)
    with pytest.raises(UserError, match="none of its runs has begun"):
        gather([file])
    write_chain(runs)
    (subject,) = gather([file])
    assert subject.name == "my pipeline" and [run.stage for run in subject.runs] == ["sft", "reward", "ppo"]
    done = CliRunner().invoke(app, ["report", str(file), "--no-data"])
    assert done.exit_code == 0 and "my pipeline" in (runs / "report.html").read_text()
    shutil.rmtree(runs / "ppo")
    done = CliRunner().invoke(app, ["report", str(file), "--no-data"])
    assert done.exit_code == 0 and "has not begun" in done.stderr
    assert LivePage([file], lambda: "")._folders(file) == [runs / "sft", runs / "reward"]


def test_several_runs_are_compared(tmp_path):
    one = write_chain(tmp_path / "one", config={"updates": 4, "kl": {"coef": 0.1}})
    two = write_chain(tmp_path / "two", gain=2.0, config={"updates": 4, "kl": {"coef": 0.3}})
    page = render(gather([one, two]))
    assert [subject.name for subject in gather([one / "ppo", two / "ppo"])] == ["one/ppo", "two/ppo"]
    assert "<h2>Comparison</h2>" in page and "kl.coef" in page and "PPO: scores" in page
    assert '"name": "one, held out"' in page.replace("&#34;", '"')
    with_sft = render(gather([one, two, one / "sft"]))
    assert re.search(r"kl\.coef</th>\s*<td[^>]*>0\.1</td>\s*<td[^>]*>0\.3</td>\s*<td[^>]*>-</td>", with_sft)
    assert "What differs in the config: PPO" not in render(gather([one / "sft", one / "ppo"]))  # one has a PPO config
    assert facts.differences([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": []}]) == [
        ("b.c", ["2", "3"]), ("d", ["-", "[]"])
    ]  # fmt: skip


def test_tokens_carry_their_numbers():
    record = {
        "text": ["a", "b<", ""],
        "logprob": [-1.0, -2.0, -3.0],
        "ref_logprob": [-1.5, -1.0, -3.0],
        "value": [1, 2, 3],
    }
    found = shown(Answer("p", "", "ab<", 1.0, True, record))
    assert [token.text for token in found.tokens] == ["a", "b<", ""]
    assert json.loads(found.tokens[1].says)["KL to the reference, nats"] == "-1"
    assert json.loads(found.tokens[0].heat) == {"kl": 0.5, "value": 0.33}
    assert shown(Answer("p", "", "ab", 1.0, True, {"text": ["a"], "logprob": "x"})).tokens[0].says == "{}"
    assert shown(Answer("p", "", "ab", 1.0, True, {"text": 3})).tokens == []


def test_the_largest_changes_come_first(tmp_path):
    samples = [sample(step, f"p{n}", "a", n if step else 0.0) for step in (0, 9) for n in (3, -5, 1, 8, -2, 0, 4, 2)]
    write_run(tmp_path / "ppo", "ppo", [], samples)
    chosen, rest = before_and_after(gather([tmp_path / "ppo"])[0].last)
    assert [pair.prompt for pair in chosen] == ["p8", "p4", "p3", "p-5", "p-2", "p0"]
    assert [pair.prompt for pair in rest] == ["p1", "p2"]


def test_thinned_lines_keep_ends_and_extremes():
    pairs = [(float(n), float(n % 7)) for n in range(5000)]
    pairs[1234] = (1234.0, 99.0)
    xs, ys = thinned(pairs)
    assert len(xs) <= 302 and (xs[0], xs[-1], max(ys)) == (0.0, 4999.0, 99.0) and xs == sorted(xs)


def test_the_command_writes_the_page(tmp_path, chain):
    done = CliRunner().invoke(app, ["report", str(chain), "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert not (chain / "report.html").exists()
    for words in (["report", str(tmp_path / "absent")], ["report", str(tmp_path)]):
        assert isinstance(CliRunner().invoke(app, words).exception, UserError)
