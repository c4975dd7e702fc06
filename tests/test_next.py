"""`rlhf data next`: information by hand, cost, coverage, the bag-of-words ensemble, the command and its refusals."""

from __future__ import annotations

import json
import math
import random

import finished
import numpy as np
import pytest
from rows import dataset, last_line, write
from typer.testing import CliRunner

from data_tools.annotate import word_ensemble
from data_tools.annotate.choose_next import (
    ChosenProposal,
    RankingTime,
    best_answers,
    choices,
    choose,
    fit_cost,
    order_information,
    order_log_probs,
)
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Proposal, Ranking
from rlhf.data.store import open_dataset
from stages.cli import data_app

LN3 = math.log(3)

# ---- information -----------------------------------------------------------------------------------------------------


def entropy(*p):
    return -sum(x * math.log(x) for x in p)


def test_information_of_a_pair_is_the_entropy_of_the_mean_minus_the_mean_entropy():
    # sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4, on average 1/2
    by_hand = math.log(2) - entropy(3 / 4, 1 / 4)
    assert order_information(np.array([[LN3, 0], [0, LN3]])) == pytest.approx(by_hand)
    # 3/4 and 1/2, on average 5/8
    by_hand = entropy(5 / 8, 3 / 8) - (entropy(3 / 4, 1 / 4) + math.log(2)) / 2
    assert order_information(np.array([[LN3, 0], [0, 0]])) == pytest.approx(by_hand)


def test_members_that_agree_leave_nothing_to_learn_also_when_all_are_undecided():
    assert order_information(np.array([[5.0, 1, 2], [6, 2, 3]])) == pytest.approx(0, abs=1e-12), "a shift says nothing"
    assert order_information(np.zeros((3, 2))) == pytest.approx(0, abs=1e-12), (
        "noise, which another ranking does not remove"
    )


def test_members_that_are_certain_of_opposite_orders_leave_the_log_of_their_number():
    assert order_information(np.array([[900.0, 0], [0, 900]])) == pytest.approx(math.log(2))
    assert order_information(np.array([[99.0, 50, 0], [0, 99, 50], [50, 0, 99]])) == pytest.approx(LN3)


def test_the_order_of_three_has_the_plackett_luce_probability():
    # exp(s) = 3, 2, 1: P(1, 2, 3) = 3/6 * 2/3
    assert math.exp(order_log_probs(np.log([3.0, 2, 1]))) == pytest.approx(1 / 3)
    # and P(3, 1, 2) = 1/6 * 3/5
    assert math.exp(order_log_probs(np.log([1.0, 3, 2]))) == pytest.approx(1 / 10)


def test_drawn_orders_estimate_what_summing_all_of_them_gives(monkeypatch):
    scores = np.random.default_rng(1).normal(size=(4, 3, 5))
    exact = order_information(scores)
    monkeypatch.setattr("data_tools.annotate.choose_next.MOST_EXACT", 4)
    assert order_information(scores) == pytest.approx(exact, rel=0.05)


def test_the_answers_that_members_dispute_are_chosen(monkeypatch):
    scores = np.array([[0.0, 2, 9, 0], [0, 0, 9, 2]])
    assert best_answers(scores, 2)[0] == (1, 3)
    assert best_answers(scores, 9)[0] == (0, 1, 2, 3)
    exact = best_answers(scores, 3)
    monkeypatch.setattr("data_tools.annotate.choose_next.MOST_SUBSETS", 0)
    assert best_answers(scores, 3) == exact and exact[0] == (0, 1, 3)


# ---- cost and coverage -----------------------------------------------------------------------------------------------


def proposal(text, *answers):
    return Proposal((Message("user", text),), candidates=tuple(Candidate(answer) for answer in answers))


def test_the_cost_is_fitted_to_times_and_assumed_without_enough_of_them():
    draw, timed = random.Random(0), []
    for _ in range(40):
        answers = ["a" * draw.randint(1, 400) + str(i) for i in range(draw.randint(2, 5))]
        asked = proposal("Q?", *answers)
        ranking = Ranking(asked.messages, candidates=asked.candidates, ranks=tuple(range(1, len(answers) + 1)),
                          seconds=RankingTime(4, 2, 0.02).seconds(asked))  # fmt: skip
        timed.append(ranking)
    found = fit_cost(timed)
    assert (found.fixed, found.answer, found.character) == pytest.approx((4, 2, 0.02), rel=0.01) and found.timed == 40
    assert fit_cost(timed[:19]) == RankingTime()
    assert RankingTime().seconds(proposal("1234", "x" * 10, "y" * 10)) == pytest.approx(3 + 3 + 1), (
        "24 characters a second"
    )


def choice(text, information=1.0, seconds=1.0):
    return ChosenProposal(proposal(text, text + " one", text + " two"), (0, 1), information, seconds)


def test_near_duplicates_are_not_chosen_together_and_not_what_was_ranked():
    fox, again, whale = (
        choice("red fox in Peru", 1.0),
        choice("red fox in Peru!", 0.99),
        choice("blue whale sings", 0.5),
    )
    chosen = choose([fox, again, whale], 2, [], per_second=True)
    assert [one.proposal for one in chosen] == [fox.proposal, whale.proposal]
    assert chosen[0].coverage == 1 and chosen[1].coverage > 0.9
    chosen = choose([fox, again, whale], 1, [again.proposal], per_second=True)
    assert chosen[0].proposal == whale.proposal
    assert len(choose([fox, fox], 5, [], True)) == 2, "no more than there are"


def test_information_counts_per_second_or_per_ranking():
    found = [choice("red fox", 1.0, 10), choice("blue whale", 0.5, 2)]
    for per_second, best in ((True, 1), (False, 0)):
        (chosen,) = choose(found, 1, [], per_second)
        assert chosen.proposal == found[best].proposal


def test_chosen_answers_keep_the_order_in_which_they_are_shown():
    (found,) = choices(
        [proposal("Q?", "a", "b", "c", "d")], [np.array([[0.0, 2, 9, 0], [0, 0, 9, 2]])], 2, RankingTime()
    )
    assert found.answers == (1, 3) and [c.text for c in found.proposal.candidates] == ["b", "d"]


# ---- the bag of words ------------------------------------------------------------------------------------------------


def rankings(count=30):
    draw = random.Random(0)
    return [
        Ranking((Message("user", f"Q{i}"),), candidates=(Candidate(f"good{draw.randrange(3)}"),
                Candidate(f"bad{draw.randrange(3)}")), ranks=(1, 2))
        for i in range(count)
    ]  # fmt: skip


def test_weights_are_where_the_gradient_is_zero_and_prior_where_nothing_is_known():
    pairs = word_ensemble.WordPairs(rankings(1), 0)
    prior = np.random.default_rng(0).normal(0, 0.1, word_ensemble.FEATURES)
    found = word_ensemble.weights(pairs, np.array([4.0]), prior)
    x = pairs.difference.toarray()[0]
    gradient = (found - prior) / word_ensemble.REGULARISATION - 4 * x / (1 + math.exp(x @ found))
    assert np.abs(gradient).max() < 1e-3 and (found == prior)[x == 0].all()


def test_the_ensemble_has_learned_known_words_and_doubts_new_ones():
    members = word_ensemble.train(rankings(60), 12, seed=0)
    known, new = word_ensemble.scores([["good1", "bad1"], ["strange", "odd"]], members)
    assert known.shape == (12, 2) and (known[:, 0] > known[:, 1]).all()
    prior = math.log(2) * (2 * word_ensemble.REGULARISATION) ** 0.5  # the difference of two words with drawn weights
    assert 0.5 * prior < np.std(new[:, 0] - new[:, 1]) < 1.5 * prior
    assert (members == word_ensemble.train(rankings(60), 12, seed=0)).all()


# ---- the command -----------------------------------------------------------------------------------------------------


def next_(*words):
    return CliRunner().invoke(data_app, ["next", *map(str, words)])


def pool(path):
    texts = ["good1", "bad1", "strange thing", "odd thing"]
    items = [proposal(f"{name}?", *(f"{text} {name}" for text in texts)) for name in ("fox", "owl", "cat", "dog")]
    return write(path, [*items, items[0]]).path


def test_the_command_writes_proposals_in_order_with_reasons(tmp_path):
    ranked = write(tmp_path / "ranked", rankings()).path
    words = (pool(tmp_path / "c"), "--ranked", ranked, "--n", 3, "--k", 2, "--json", "--out")
    done = next_(*words, tmp_path / "next")
    assert done.exit_code == 0, done.output
    found, made = last_line(done), open_dataset(tmp_path / "next", "proposal")
    chosen = list(made.records())
    assert found["written"] == len(chosen) == 3 and found["skipped"] == 1 and found["timed"] == 0
    assert [one["id"] for one in found["chosen"]] == [one.id for one in chosen]
    assert all(len(one.candidates) == 2 for one in chosen)
    why = [json.loads(line) for line in (made.path / "why.jsonl").read_text().splitlines()]
    assert why == found["chosen"] and all(one["information"] > 0 and 0 < one["coverage"] <= 1 for one in why)
    assert len(made.manifest["origin"]["parents"]) == 2 and "information" in done.stdout
    again = last_line(next_(*words, tmp_path / "again"))
    assert again["chosen"] == found["chosen"]


def test_a_prompt_cannot_control_the_terminal(tmp_path):
    candidates = write(tmp_path / "c", [proposal("\x1b[2Jfox\n[red]owl", "good1 one", "new words")]).path
    ranked = write(tmp_path / "ranked", rankings(3)).path
    done = next_(candidates, "--ranked", ranked, "--n", 1, "--out", tmp_path / "o")
    assert done.exit_code == 0 and "\x1b" not in done.stdout and "fox [red]owl" in done.stdout


def test_what_was_ranked_is_not_chosen_again(tmp_path):
    candidates = pool(tmp_path / "c")
    first = next(open_dataset(candidates).records())
    done = Ranking(first.messages, candidates=first.candidates, ranks=(1, 2, 3, 4))
    ranked = write(tmp_path / "r", [done]).path
    found = last_line(next_(candidates, "--ranked", ranked, "--n", 9, "--json", "--out", tmp_path / "o"))
    assert found["written"] == 3 and first.prompt_id not in {one["prompt_id"] for one in found["chosen"]}


def test_reward_models_say_what_is_in_doubt_and_too_long_answers_are_rejected(tmp_path):
    from rlhf.inference.reward_model import open_reward_model

    sft = finished.sft(tmp_path / "sft")
    runs = [finished.reward(tmp_path / f"reward-{seed}", sft, seed=seed) for seed in (3, 9)]
    items = [proposal("Q1?", "Yes.", "No, it is not.", "Maybe."), proposal("Q2?", "word " * 9000, "No.")]
    candidates = write(tmp_path / "c", items).path
    spec = f"{{name: ensemble, models: [{', '.join(runs)}]}}"
    done = next_(candidates, "--reward", spec, "--n", 5, "--k", 2, "--json", "--out", tmp_path / "o")
    assert done.exit_code == 0, done.output
    found = last_line(done)
    assert (found["written"], found["rejected"]) == (1, 1)
    scores = np.array([open_reward_model(run).raw_scores(items[:1])[0] for run in runs])
    answers, information = best_answers(scores, 2)
    assert tuple(found["chosen"][0]["answers"]) == answers
    assert found["chosen"][0]["information"] == pytest.approx(information, rel=1e-3)
    rejected = json.loads((tmp_path / "o" / "rejected.jsonl").read_text())
    assert "too long for a reward model" in json.dumps(rejected)
    done = next_(candidates, "--reward", sft, "--reward", runs[0], "--n", 1, "--out", tmp_path / "p")
    assert "is a run of the sft stage" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "neither --reward nor --ranked"),
        (("--reward", "one"), "one reward model"),
        (("--reward", "data_tools.demo_world.rules:points"), "is not a reward model"),
        (("--reward", "{name: ensemble}"), "--reward"),
        (("--ranked", "tied"), "no ordered pair"),
        (("--ranked", "tied", "--split", "test"), "no unranked proposal"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(tmp_path, monkeypatch, words, fault):
    monkeypatch.chdir(tmp_path)
    candidates = pool(tmp_path / "c")
    dataset(tmp_path / "tied", [{"prompt": "Q", "candidates": ["a", "b"], "ranks": [1, 1]}])
    done = next_(candidates, "--n", 1, "--out", "o", *words)
    assert isinstance(done.exception, UserError) and fault in str(done.exception)
    assert not (tmp_path / "o").exists()
