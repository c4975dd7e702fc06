"""The table of metrics: what `rlhf data check` measures, what each figure means, and what to do about it.

A row is a function of the facts that gives an estimate, or says in words why there is none; its first docstring line is
the metric's description. `data_tools.check.catalogue.metric` tells what else belongs to it.
"""

from __future__ import annotations

import numpy as np

from data_tools.check.catalogue import (
    ANY,
    METRICS,
    NO_NAMES,
    NO_NEAR,
    NO_SETS,
    NO_SPLITS,
    NO_TWO,
    WITH_ANSWERS,
    Found,
    metric,
    or_why,
)
from data_tools.statistics import agreement, biases, consistency, duplicates, words
from data_tools.statistics.ceiling import agreement_sums, ceiling
from data_tools.statistics.facts import Facts
from data_tools.statistics.intervals import Estimate, bootstrapped, ratio

__all__ = ["METRICS"]

# ---- duplicates -----------------------------------------------------------------------------------------------------


@metric(
    "duplicate-records", "duplicates", "share", "records", kinds=ANY, look=(">0.01",), bad=(">0.1",),
    advice="Run `rlhf data dedup`; a record that stands twice counts twice in training.",
)  # fmt: skip
def duplicate_records(facts: Facts) -> Found:
    """Records that an earlier one repeats in everything: prompt, answers, ranks, annotator and time."""
    return facts.repeats[0]


@metric(
    "prompts-across-splits", "duplicates", "count", "prompts", kinds=ANY, bad=(">0",),
    advice="Run `rlhf data split` anew: an evaluation on prompts that were trained on flatters.",
)  # fmt: skip
def prompts_across_splits(facts: Facts) -> Found:
    """Prompts that stand in more than one split."""
    return facts.split_leaks[0] if facts.split_leaks else NO_SPLITS


@metric(
    "near-duplicates-within-splits", "duplicates", "share", "prompts", kinds=ANY, sampled="prompts", look=(">0.1",),
    bad=(">0.5",),
    advice="Run `rlhf data dedup --by prompt --near 0.8` where they ask the same; templates may be meant so.",
)  # fmt: skip
def near_duplicates_within_splits(facts: Facts) -> Found:
    """Prompts that share four fifths of their three-word runs with an earlier, different prompt of their split."""
    return facts.near_prompts.within if facts.near else NO_NEAR


@metric(
    "near-duplicates-across-splits", "duplicates", "count", "prompts", kinds=ANY, sampled="prompts", bad=(">0",),
    advice="Run `rlhf data split --near 0.8`, which keeps near-duplicates together.",
)  # fmt: skip
def near_duplicates_across_splits(facts: Facts) -> Found:
    """Prompts whose near-duplicates stand in another split."""
    if not facts.near:
        return NO_NEAR
    return or_why(facts.near_prompts.across, NO_SPLITS)


@metric(
    "contaminated-prompts", "duplicates", "count", "prompts of train or no split", kinds=ANY, bad=(">0",),
    advice="Take them out (`rlhf data dedup --against EVALSET`); the evaluation is worth nothing otherwise.",
)  # fmt: skip
def contaminated_prompts(facts: Facts) -> Found:
    """Prompts of train, or of no split, that stand in an evaluation set given with --against."""
    return facts.contaminated[0] if facts.evaluation else NO_SETS


@metric(
    "near-contaminated-prompts", "duplicates", "count", "prompts of train or no split", kinds=ANY, sampled="prompts",
    bad=(">0",), advice="Look at the examples, and take out those that ask the same thing.",
)  # fmt: skip
def near_contaminated_prompts(facts: Facts) -> Found:
    """Prompts of train, or of no split, that are near to a prompt of an evaluation set."""
    if not facts.evaluation:
        return NO_SETS
    return facts.near_contaminated[0] if facts.near else NO_NEAR


@metric(
    "repeated-answers", "duplicates", "share", "answers", kinds=WITH_ANSWERS, look=(">0.1",), bad=(">0.3",),
    advice="Look at the most frequent ones: stock refusals teach the reward model a phrase, not a judgement.",
)  # fmt: skip
def repeated_answers(facts: Facts) -> Found:
    """Answers whose exact text also answers another prompt."""
    return facts.repeated_answers[0] if facts.repeated_answers else "no answer there"


@metric(
    "near-duplicate-answers", "duplicates", "share", "answers", kinds=WITH_ANSWERS, sampled="records", look=(">0.2",),
    bad=(">0.5",), advice="Look for templates and stock phrases in what wrote the answers.",
)  # fmt: skip
def near_duplicate_answers(facts: Facts) -> Found:
    """Answers that are near to, or the same as, an answer to another prompt."""
    if not facts.near:
        return NO_NEAR
    return or_why(duplicates.near_answers(facts.columns, facts.texts), "no answer there")


@metric(
    "near-identical-pairs", "duplicates", "share", "rankings", kinds=("proposal", "ranking"), sampled="records",
    look=(">0.05",), bad=(">0.2",), advice="Propose more distinct answers: there is nothing to rank in these.",
)  # fmt: skip
def near_identical_pairs(facts: Facts) -> Found:
    """Rankings whose first two answers are different, and near-duplicates of each other."""
    found = duplicates.near_identical_pairs(facts.columns, facts.texts)
    return or_why(found, "no two different answers there")


# ---- consistency ----------------------------------------------------------------------------------------------------


@metric(
    "ties", "consistency", "share", "pairs of answers", look=(">0.4",),
    advice="Tied pairs teach nothing: propose more distinct answers.",
)  # fmt: skip
def ties(facts: Facts) -> Found:
    """Pairs of different answers of a ranking that were ranked equal."""
    return or_why(consistency.ties(facts.columns, facts.pairs), "no pair of different answers")


@metric(
    "contradictions", "consistency", "share", "pairs of answers ordered more than once", look=(">0.5",),
    advice="Aggregate them (`rlhf data aggregate`) before training. More judgements a pair make more contradictions: "
    "`agreement` judges the people.",
)  # fmt: skip
def contradictions(facts: Facts) -> Found:
    """Pairs of answers to one prompt that were ordered both ways, by whomever; ties aside."""
    return or_why(consistency.contradictions(facts.columns, facts.pairs), "no pair was ordered more than once")


@metric(
    "contradictions-between-annotators", "consistency", "share", "pairs ordered by two or more people",
    advice="Discuss the examples with the annotators, and write the answer into the guideline.",
)  # fmt: skip
def contradictions_between_annotators(facts: Facts) -> Found:
    """Pairs that two or more named people ordered, and on which two of them differ."""
    return or_why(consistency.contradictions_between(facts.columns, facts.votes), NO_TWO)


@metric(
    "self-contradictions", "consistency", "share", "pairs that one person ordered more than once", look=(">0.1",),
    bad=(">0.3",), advice="Ask these people: they clicked in haste, or the two answers are equally good.",
)  # fmt: skip
def self_contradictions(facts: Facts) -> Found:
    """Pairs that one named person ordered more than once, and both ways."""
    found = consistency.self_contradictions(facts.columns, facts.pairs)
    return or_why(found, "nobody who is named ordered a pair more than once")


@metric(
    "cycles", "consistency", "share", "prompts with three or more answers in several rankings", look=(">0.1",),
    bad=(">0.3",), advice="No score can fit a circle: ask for more judgements there, or for one criterion.",
)  # fmt: skip
def cycles(facts: Facts) -> Found:
    """Prompts where the majorities run in a circle: A over B, B over C, C over A."""
    found = consistency.cycles(facts.columns, facts.pairs)
    return or_why(found, "no prompt has three answers and several rankings")


# ---- biases ---------------------------------------------------------------------------------------------------------


@metric(
    "longer-wins", "biases", "share", "ordered pairs of unequal length", look=(">0.6", "<0.4"), bad=(">0.7", "<0.3"),
    advice="See whether length is what people like or what they fall for; compare answers of like length, and watch "
    "the reward model's correlation with length.",
)  # fmt: skip
def longer_wins(facts: Facts) -> Found:
    """Pairs in which the longer answer won; one half = length does not matter."""
    return or_why(biases.longer_wins(facts.columns, facts.pairs), "no ordered pair of unequal length")


@metric(
    "first-wins", "biases", "share", "ordered pairs whose order shown is known", look=(">0.55", "<0.45"),
    bad=(">0.65", "<0.35"),
    advice="Shuffle the answers before they are shown; tell the annotators; look who it is below.",
)  # fmt: skip
def first_wins(facts: Facts) -> Found:
    """Pairs in which the answer shown first (above, or on the left) won; one half = place does not matter."""
    found = biases.first_wins(facts.columns, facts.pairs)
    return or_why(found, "no ranking says in which order its answers were shown")


@metric(
    "person-wins", "biases", "share", "ordered pairs of a person's and a model's answer",
    advice="Where people nearly always win, the reward model may learn to tell who wrote it.",
)  # fmt: skip
def person_wins(facts: Facts) -> Found:
    """Pairs of a person's and a model's answer in which the person's won."""
    found = biases.person_wins(facts.columns, facts.pairs)
    return or_why(found, "no pair of an answer by a person and one by a model is known")


@metric(
    "bag-of-words", "biases", "share", "ordered pairs", sampled="pairs", look=(">0.7",), bad=(">0.85",),
    advice="A reward model may pass by style alone: see that it beats this figure clearly, and look for phrases that "
    "give a source away.",
)  # fmt: skip
def bag_of_words(facts: Facts) -> Found:
    """Pairs whose winner a linear model of words names, without seeing the prompt; held-out prompts, chance is 1/2."""
    found = words.bag_of_words(facts.columns, facts.pairs, facts.texts)
    return or_why(found, f"fewer than {words.FEWEST_PROMPTS} prompts with an ordered pair")


# ---- agreement ------------------------------------------------------------------------------------------------------


@metric(
    "agreement", "agreement", "share", "pairs ordered by two or more people", look=("<0.7",), bad=("<0.6",),
    advice="Write a sharper guideline with examples, train the annotators on it, and ask again for a sample. OpenAI's "
    "labellers agree on 73 % (Ouyang et al. 2022).",
)  # fmt: skip
def agreement_of_two(facts: Facts) -> Found:
    """The probability that two people who ordered a pair ordered it alike; ties aside; chance is one half."""
    sums = agreement_sums(facts.votes)
    sums = sums[sums[:, 1] > 0]
    ordered = facts.votes.counts()[:, [0, 2]].sum(axis=1) > 1
    return or_why(bootstrapped(sums, ratio, int(ordered.sum())), NO_TWO)


@metric(
    "agreement-with-ties", "agreement", "share", "pairs judged by two or more people",
    advice="Far below `agreement`: people differ on what a tie is; say so in the guideline.",
)  # fmt: skip
def agreement_with_ties(facts: Facts) -> Found:
    """As `agreement`, with a tie as a third answer that agrees with a tie only; chance depends on the ties."""
    sums = agreement.agreement_with_ties_sums(facts.votes)
    return or_why(bootstrapped(sums, ratio, len(facts.votes.prompt)), NO_TWO)


@metric(
    "alpha", "agreement", "number", "pairs judged by two or more people",
    advice="As for agreement: of pairs without ties alpha is 2 x agreement - 1. Krippendorff asks for 0.67 for "
    "tentative conclusions; preferences seldom reach it.",
)  # fmt: skip
def alpha(facts: Facts) -> Found:
    """Krippendorff's alpha (first better < tie < second better, ordinal): 1 = full agreement, 0 = chance."""
    if not len(facts.votes.prompt):
        return NO_TWO
    value = agreement.krippendorff_alpha(facts.votes.counts())
    if np.isnan(value):
        return "all judgements are ties"
    sums = agreement.coincidence_sums(facts.votes)
    found = bootstrapped(sums, agreement.alpha_of_coincidences)
    bounds = (found.low, found.high) if found else (None, None)
    return Estimate(value, *bounds, n=len(facts.votes.prompt))


NO_BLOCK = "no three or more answers were ranked by two named people"


@metric(
    "kendall-tau", "agreement", "number", "prompts ranked by two or more people, K of 3 or more",
    advice="As for agreement; where the best answer is agreed on and the rest is not, rank fewer answers.",
)  # fmt: skip
def kendall_tau(facts: Facts) -> Found:
    """Kendall's tau-b between two people's rankings of the same answers: 1 = alike, 0 = chance, -1 = reversed."""
    tau = facts.kendall[0]
    return or_why(bootstrapped(tau, ratio, len(tau)), NO_BLOCK)


@metric(
    "kendall-w", "agreement", "number", "prompts ranked by two or more people, K of 3 or more",
    advice="As for agreement; compare it with 1 / people, not with 0.",
)  # fmt: skip
def kendall_w(facts: Facts) -> Found:
    """Kendall's W, the concordance of all rankings of the same answers: 1 = alike; chance is 1 / people."""
    w = facts.kendall[1]
    return or_why(bootstrapped(w, ratio, len(w)), NO_BLOCK)


@metric(
    "ceiling", "agreement", "share", "pairs ordered by two or more people",
    advice="Do not expect more of a reward model on single judgements; aggregate several of them for a cleaner test "
    "set.",
)  # fmt: skip
def ceiling_of_model(facts: Facts) -> Found:
    """The best accuracy that a reward model can have against the choice of one annotator (an upper bound)."""
    sums = agreement_sums(facts.votes)
    ordered = facts.votes.counts()[:, [0, 2]].sum(axis=1) > 1
    found = bootstrapped(sums[sums[:, 1] > 0], lambda sums: ceiling(ratio(sums)), int(ordered.sum()))
    return or_why(found, NO_TWO)


# ---- annotators -----------------------------------------------------------------------------------------------------


@metric(
    "annotators", "annotators", "number", "rankings",
    advice="Few people teach few tastes; see the table.",
)  # fmt: skip
def annotators(facts: Facts) -> Found:
    """People who are named as annotators."""
    return Estimate(float(len(facts.annotators)), n=len(facts.columns)) if facts.annotators else NO_NAMES


def _how_many(facts: Facts, verdict: str) -> Found:
    judged = [one for one in facts.annotators if one.verdict != "unclear"]
    if not judged:
        return "nobody can be told from a random clicker by the pairs that others judged too"
    return _named([one.name for one in judged if one.verdict == verdict], len(judged))


def _named(names: list[str], n: int) -> Estimate:
    """How many there are, and who the first are."""
    return Estimate(float(len(names)), n=n, note=", ".join(names[:5]) + ", ..." * (len(names) > 5))


@metric(
    "random-annotators", "annotators", "count", "annotators with enough pairs that others ordered too", bad=(">0",),
    advice="Look at their work and their time an item; leave it out with `rlhf data filter --where`, or weigh it "
    "with `rlhf data aggregate`.",
)  # fmt: skip
def random_annotators(facts: Facts) -> Found:
    """People who agree with the others less than these do among themselves, and no more than a random clicker would."""
    return _how_many(facts, "random")


@metric(
    "reversed-annotators", "annotators", "count", "annotators with enough pairs that others ordered too", bad=(">0",),
    advice="See whether their ranks run the other way (5 = best), in the tool or in the import.",
)  # fmt: skip
def reversed_annotators(facts: Facts) -> Found:
    """People who disagree with the others more than chance would."""
    return _how_many(facts, "reversed")


@metric(
    "one-sided-annotators", "annotators", "count", "annotators whose order shown is known", look=(">0",),
    advice="Where the order was shuffled they click on a side. Where it was not (one model always first), it may be "
    "taste.",
)  # fmt: skip
def one_sided_annotators(facts: Facts) -> Found:
    """People who prefer the answer shown first, or last, more than chance allows."""
    placed = [one for one in facts.annotators if one.first is not None]
    if not placed:
        return "no named annotator's ranking says in which order its answers were shown"
    return _named([one.name for one in placed if one.one_sided], len(placed))


@metric(
    "busiest-annotator", "annotators", "share", "rankings by named people", look=(">0.8",),
    advice="The reward model will have this person's taste: share the work out.",
)  # fmt: skip
def busiest_annotator(facts: Facts) -> Found:
    """Rankings that the one who made most of them made."""
    total = sum(one.rankings for one in facts.annotators)
    if not total:
        return NO_NAMES
    busiest = max(facts.annotators, key=lambda one: one.rankings)
    return Estimate(busiest.rankings / total, n=total, note=busiest.name)


# ---- texts ----------------------------------------------------------------------------------------------------------


@metric(
    "prompt-length", "texts", "number", "records", kinds=ANY,
    advice="Choose the longest prompt that training takes so that few are cut; the table has the 95 % point.",
)  # fmt: skip
def prompt_length(facts: Facts) -> Found:
    """Median characters of a prompt, all turns together."""
    return Estimate(float(np.median(facts.columns.prompt_chars)), n=len(facts.columns))


@metric(
    "answer-length", "texts", "number", "answers", kinds=WITH_ANSWERS,
    advice="Choose the longest answer that training takes so that few are cut; the table has the 95 % point.",
)  # fmt: skip
def answer_length(facts: Facts) -> Found:
    """Median characters of an answer."""
    chars = facts.columns.chars
    return Estimate(float(np.median(chars)), n=len(chars)) if len(chars) else "no answer there"


@metric(
    "languages", "texts", "number", "prompts long enough to tell", kinds=ANY, sampled="languages",
    advice="See that the base model knows them, and that annotators do.",
)  # fmt: skip
def languages(facts: Facts) -> Found:
    """Languages that one in fifty prompts or more is in."""
    found = facts.languages.prompts
    total = found.total()
    if not total:
        return "no prompt is long enough to tell its language"
    return _named([code for code, times in found.most_common() if times >= total / 50], total)


@metric(
    "answers-in-another-language", "texts", "share", "best answers long enough to tell", kinds=WITH_ANSWERS,
    sampled="languages", look=(">0.05",), bad=(">0.2",),
    advice="Look at these prompts: translation tasks are fine, a model that slips into English is not.",
)  # fmt: skip
def answers_in_another_language(facts: Facts) -> Found:
    """Best answers in another language than their prompt."""
    return or_why(facts.languages.other, "no prompt and answer are long enough to tell their language")
