"""Effects of perturbations on the policy's own completions: by hand, and in PPO runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from logged import lines as metrics
from ppo_runs import SMALL, config
from pydantic import ValidationError

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.guard.config import PerturbConfig
from rlhf.guard.perturbed import Perturber, effect, metric_name
from rlhf.reward.perturbations import PERTURBATIONS
from stages.ppo import PPO, run

NAME = "guard/perturbation_effect"
PERTURB = {"every": 2, "answers": 4, "names": ["markdown", "repetition"]}


@pytest.fixture(scope="module")
def chat():
    return load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())


def words(inputs):
    """One point per word."""
    return torch.tensor([float(len(answer.split())) for answer in inputs.completions])


def measured(chat, texts, source=words, limit=500, batch_tokens=100, **values):
    perturber = Perturber(PerturbConfig(every=3, **values), source, chat, limit, batch_tokens)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = chat.whole(messages, "")[:-1]
    completions = [SimpleNamespace(ids=chat.response(answer)) for answer in texts]
    count = len(texts)
    return perturber(3, [prompt] * count, [messages] * count, completions)


def test_effects_by_hand(chat):
    # 21 words come first; the last sentence comes twice more: of 2 words and of 1
    found = measured(chat, ["One two. Three four.", "Five."], names=("filler", "repetition"))
    assert found == {NAME: 12.0, f"{NAME}/filler": 21.0, f"{NAME}/repetition": 3.0}
    assert effect([1.0, 4.0, 2.0, 0.0], [(0, 1), (2, 3)]) == 0.5


def test_blank_answers_and_those_beyond_the_number_are_left_out(chat):
    texts = ["", "One two.", " ", "Three.", "Four five six."]
    found = measured(chat, texts, names=("repetition",), answers=2)
    assert found[f"{NAME}/repetition"] == 3.0
    assert measured(chat, ["", " "]) == {}


def test_changed_answers_that_are_too_long_are_left_out(chat):
    limit = len(chat.whole([{"role": "user", "content": "Hello"}], "One."))
    assert measured(chat, ["One."], names=("repetition",), limit=limit) == {}


def test_only_every_so_many_updates_are_measured(chat):
    perturber = Perturber(PerturbConfig(every=3), words, chat, 500, 100)
    assert perturber(2, [], [], []) == {}
    assert Perturber(None, words, chat, 500, 100)(0, [], [], []) == {}


def test_a_name_that_is_changed_is_changed_in_the_prompt_too(chat):
    seen = []

    def note(inputs):
        seen.extend(zip((m[-1]["content"] for m in inputs.messages), inputs.completions))
        return words(inputs)

    perturber = Perturber(PerturbConfig(names=("swapped names",)), note, chat, 500, 100)
    messages, answer = [{"role": "user", "content": "Who is Anna?"}], "Anna is here."
    perturber(0, [chat.whole(messages, "")[:-1]], [messages], [SimpleNamespace(ids=chat.response(answer))])
    (_, unchanged), (prompt, changed) = sorted(seen, key=lambda pair: "Anna" not in pair[1])
    assert unchanged == answer and "Anna" not in prompt + changed
    assert prompt.removeprefix("Who is ").removesuffix("?") == changed.removesuffix(" is here.")


def test_a_score_that_is_not_finite_is_named(chat):
    with pytest.raises(UserError, match=r"guard\.perturb: the score of a changed completion is not a finite number"):
        measured(chat, ["One."], source=lambda inputs: words(inputs) * float("nan"))


def test_perturbations_that_should_lower_the_score_are_refused():
    with pytest.raises(ValidationError, match="'truncation' should lower a score; those that should leave it as it is"):
        PerturbConfig(names=("truncation",))
    with pytest.raises(ValidationError, match="unknown perturbation"):
        PerturbConfig(names=("trunkation",))
    with pytest.raises(ValidationError, match="named twice"):
        PerturbConfig(names=("filler", "filler"))


def test_a_run_logs_the_effects_and_is_the_same_otherwise(tmp_path, prompts):
    small = {**SMALL, "updates": 3}
    run(config(tmp_path / "plain", prompts, **small))
    run(config(tmp_path / "seen", prompts, **small, guard={"perturb": PERTURB}))
    seen = metrics(tmp_path / "seen")
    assert [{k: v for k, v in row.items() if not k.startswith(NAME)} for row in seen] == metrics(tmp_path / "plain")
    own = {row["step"]: {k for k in row if k.startswith(NAME)} for row in seen if "objective/scores" in row}
    assert own == {1: {NAME, f"{NAME}/markdown", f"{NAME}/repetition"}, 2: set(), 3: own[1]}


def state(folder):
    """The guard's in the last checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return json.loads((newest / "ppo.json").read_text("utf-8"))["guard"]


@pytest.mark.slow
def test_a_resumed_run_measures_what_the_uninterrupted_one_does(tmp_path, prompts):
    settings = {"updates": 3, "guard": {"perturb": PERTURB | {"every": 1}}}
    run(config(tmp_path / "whole", prompts, **settings))
    broken = PPO(config(tmp_path / "cut", prompts, **settings), resume=False, overwrite=False)
    broken.evaluate()
    found = broken.update(0)
    broken.done = 1
    broken.reporter.update(1, found)
    broken.reporter.alarms(broken.guard.observe(1, found))
    broken.save()
    run(config(tmp_path / "cut", prompts, **settings), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    assert len(state(tmp_path / "cut")["history"]["first"][NAME]) == 3


def test_the_metrics_page_names_every_perturbation_that_can_be_watched():
    page = (tiny.REPOSITORY / "docs" / "metrics.md").read_text("utf-8")
    names = [metric_name(row.name) for row in PERTURBATIONS if row.traits["expected"] == "same"]
    assert f"`{NAME}`" in page and not [name for name in names if f"`{NAME}/{name}`" not in page]
