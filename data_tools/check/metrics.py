"""The table of metrics: what `rlhf data check` measures, what each metric means, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.statistics import agreement, biases, consistency, duplicates, words
from data_tools.statistics.agreement import agreement_estimate, ceiling_estimate
from data_tools.statistics.facts import Facts
from data_tools.statistics.intervals import Estimate, bootstrapped, ratio
from rlhf.data.schema import KINDS

Found = Estimate | str
"""A metric's estimate, or the reason why there is none."""
ANY, RANKINGS = tuple(KINDS), ("ranking",)
WITH_ANSWERS = ("demonstration", "proposal", "ranking")

NO_NEAR = "the near-duplicate search was switched off (--no-near)"
NO_SETS = "no evaluation set was given (--against)"
NO_SPLITS = "the dataset has fewer than two splits"
NO_ANSWER = "the dataset has no answers"
NO_TWO = "no pair of answers was ordered by two named annotators"
NO_NAMES = "no ranking names its annotator"
NO_BLOCK = "no two named annotators ranked the same three or more answers"
SHARED_PAIRS = "pairs ordered by two or more annotators"
JUDGED_PAIRS = "pairs judged by two or more annotators"
COMPARED = "annotators with enough pairs that others ordered too"


@dataclass(frozen=True)
class Metric:
    """What `rlhf data check` measures."""

    name: str
    part: str
    """The part of the report that shows it, a key of `show.PARTS`."""
    unit: str
    """fraction (0 to 1), count (of faults), or number."""
    basis: str
    """What the metric is counted over; it follows a number in the report."""
    summary: str
    measure: Callable[[Facts], Found]
    advice: str
    """What to do if it needs a look or is bad."""
    kinds: tuple[str, ...] = RANKINGS
    """The kinds of dataset that have it."""
    sampled: str = ""
    """What is sampled for it in a large dataset, a key of `Facts.is_sample`; empty if nothing is."""
    look: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    """It needs a look, or is bad, if any of these conditions holds. Without any it is for information."""


METRICS: list[Metric] = []


def metric(*facts: Any, look: str = "", bad: str = "", **more: Any) -> None:
    """Add a metric to the table; conditions are given with spaces between them."""
    METRICS.append(Metric(*facts, look=tuple(look.split()), bad=tuple(bad.split()), **more))


def if_near(measure: Callable[[Facts], Found]) -> Callable[[Facts], Found]:
    """The metric, if near-duplicates are searched for."""
    return lambda facts: measure(facts) if facts.near else NO_NEAR


# fmt: off

# ---- duplicates -----------------------------------------------------------------------------------------------------

metric("duplicate-records", "duplicates", "fraction", "records",
       "Records that repeat an earlier one exactly: prompt, answers, ranks, annotator and time.",
       lambda facts: facts.repeats[0],
       kinds=ANY, look=">0.01", bad=">0.1",
       advice="Run `rlhf data dedup`: each copy adds its weight in training.")

metric("prompts-across-splits", "duplicates", "count", "prompts", "Prompts that are in more than one split.",
       lambda facts: facts.split_leaks[0] if facts.split_leaks else NO_SPLITS,
       kinds=ANY, bad=">0",
       advice="Run `rlhf data split` again: evaluation prompts that are in the training set make the score look better "
              "than it is.")

metric("near-duplicates-within-splits", "duplicates", "fraction", "prompts",
       "Prompts that share four fifths of their three-word sequences with an earlier, different prompt of their split.",
       if_near(lambda facts: facts.near_prompts.within),
       kinds=ANY, sampled="prompts", look=">0.1", bad=">0.5",
       advice="Run `rlhf data dedup --by prompt --near 0.8` if they ask the same thing; prompts made from a template "
              "may be similar on purpose.")

metric("near-duplicates-across-splits", "duplicates", "count", "prompts",
       "Prompts that have a near-duplicate in another split.",
       if_near(lambda facts: facts.near_prompts.across or NO_SPLITS),
       kinds=ANY, sampled="prompts", bad=">0",
       advice="Run `rlhf data split --near 0.8`, which puts near-duplicates into the same split.")

metric("contaminated-prompts", "duplicates", "count", "prompts of train or no split",
       "Prompts of train, or of no split, that are also in an evaluation set given with --against.",
       lambda facts: facts.contaminated[0] if facts.contaminated else NO_SETS,
       kinds=ANY, bad=">0",
       advice="Remove them with `rlhf data dedup --against EVALSET`; otherwise the evaluation means nothing.")

metric("near-contaminated-prompts", "duplicates", "count", "prompts of train or no split",
       "Prompts of train, or of no split, that are near-duplicates of a prompt of an evaluation set.",
       lambda facts: if_near(lambda facts: facts.near_contaminated[0])(facts) if facts.evaluation else NO_SETS,
       kinds=ANY, sampled="prompts", bad=">0",
       advice="Look at the examples, and remove the prompts that ask the same thing.")

metric("repeated-answers", "duplicates", "fraction", "answers",
       "Answers whose exact text also answers another prompt.",
       lambda facts: facts.repeated_answers[0] if facts.repeated_answers else NO_ANSWER,
       kinds=WITH_ANSWERS, look=">0.1", bad=">0.3",
       advice="Look at the most frequent ones: from stock refusals the reward model learns a phrase, not a judgement.")

metric("near-duplicate-answers", "duplicates", "fraction", "answers",
       "Answers that are near-duplicates or copies of an answer to another prompt.",
       if_near(lambda facts: duplicates.near_answers(facts.texts) or NO_ANSWER),
       kinds=WITH_ANSWERS, sampled="records", look=">0.2", bad=">0.5",
       advice="Look for templates and stock phrases in the model or source that wrote the answers.")

metric("near-identical-pairs", "duplicates", "fraction", "rankings",
       "Rankings whose first two answers differ but are near-duplicates of each other.",
       lambda facts: duplicates.near_identical_pairs(facts.texts) or "no record has two answers",
       kinds=("proposal", "ranking"), sampled="records", look=">0.05", bad=">0.2",
       advice="Propose answers that differ more: annotators have nothing to choose between here.")

# ---- consistency ----------------------------------------------------------------------------------------------------

metric("ties", "consistency", "fraction", "pairs of answers",
       "Pairs of different answers in a ranking that were ranked equal.",
       lambda facts: consistency.ties(facts.pairs) or "no ranking has two different answers",
       look=">0.4",
       advice="Propose answers that differ more: tied pairs teach the reward model nothing.")

metric("contradictions", "consistency", "fraction", "pairs of answers ordered more than once",
       "Pairs of answers to one prompt that were ordered both ways, by one or several annotators; ties do not count.",
       lambda facts: consistency.contradictions(facts.pairs) or "no pair was ordered more than once",
       look=">0.3",
       advice="Aggregate the rankings (`rlhf data aggregate`) before training. With two judgements per pair this is "
              "1 - `agreement`; it grows with their number, so compare annotators by `agreement`.")

metric("contradictions-between-annotators", "consistency", "fraction", SHARED_PAIRS,
       "Pairs that two or more named annotators ordered, and not all in the same way.",
       lambda facts: consistency.contradictions_between(facts.votes) or NO_TWO,
       advice="Discuss the examples with the annotators, and add the decision to the guideline.")

metric("self-contradictions", "consistency", "fraction", "pairs that one annotator ordered more than once",
       "Pairs that one named annotator ordered more than once, and both ways.",
       lambda facts: (consistency.self_contradictions(facts.pairs)
                      or "no named annotator ordered a pair more than once"),
       look=">0.1", bad=">0.3",
       advice="Ask these annotators: either they clicked in haste, or the two answers are equally good.")

metric("cycles", "consistency", "fraction", "prompts with three or more answers in several rankings",
       "Prompts where the majorities form a cycle: A over B, B over C, C over A.",
       lambda facts: (consistency.cycles(facts.pairs)
                      or "no prompt has three answers and several rankings"),
       look=">0.1", bad=">0.3",
       advice="No reward can fit a cycle: collect more judgements there, or ask for a single criterion.")

# ---- biases ---------------------------------------------------------------------------------------------------------

metric("longer-wins", "biases", "fraction", "ordered pairs of unequal length",
       "Win rate of the longer answer; one half means that length does not matter.",
       lambda facts: biases.longer_win_rate(facts.pairs) or "no ordered pair of unequal length",
       look=">0.6 <0.4", bad=">0.7 <0.3",
       advice="Find out whether annotators prefer length itself: compare answers of similar length, and watch the "
              "reward model's correlation with length.")

metric("first-wins", "biases", "fraction", "ordered pairs with a known display order",
       "Win rate of the answer shown first (at the top or on the left); one half means that the position does not "
       "matter.",
       lambda facts: biases.first_win_rate(facts.pairs) or "no ranking records the display order",
       look=">0.55 <0.45", bad=">0.65 <0.35",
       advice="Shuffle the answers before they are shown, and inform the annotators. The table of annotators shows who "
              "prefers a position.")

metric("person-wins", "biases", "fraction", "ordered pairs of a human and a model answer",
       "Win rate of human answers against model answers.",
       lambda facts: (biases.person_win_rate(facts.pairs)
                      or "no ranking has both human and model answers"),
       advice="If human answers nearly always win, the reward model may learn to recognise the author.")

metric("bag-of-words", "biases", "fraction", "ordered pairs",
       "Accuracy of a linear model of words that does not see the prompt, on held-out prompts; chance is one half.",
       lambda facts: (words.bag_of_words(facts.pairs, facts.texts)
                      or f"fewer than {words.FEWEST_PROMPTS} prompts have an ordered pair"),
       sampled="pairs", look=">0.7", bad=">0.85",
       advice="A reward model can reach this accuracy from style alone. Check that it does clearly better, and look "
              "for phrases that reveal the source of an answer.")

# ---- agreement ------------------------------------------------------------------------------------------------------

def _alpha(facts: Facts) -> Found:
    if not len(facts.votes.prompt):
        return NO_TWO
    found = bootstrapped(
        agreement.coincidence_sums(facts.votes), agreement.alpha_of_coincidences, len(facts.votes.prompt)
    )
    return found or "all judgements are ties"


metric("agreement", "agreement", "fraction", SHARED_PAIRS,
       "Probability that two annotators who ordered a pair ordered it in the same way; ties do not count, chance is "
       "one half.",
       lambda facts: agreement_estimate(facts.votes) or NO_TWO,
       look="<0.7", bad="<0.6",
       advice="Write a more precise guideline with examples, train the annotators on it, and collect a new sample. "
              "OpenAI's labellers agree on 73 % (Ouyang et al. 2022).")

metric("agreement-with-ties", "agreement", "fraction", JUDGED_PAIRS,
       "Like `agreement`, with a tie as a third outcome that agrees with ties only; chance depends on the number of "
       "ties.",
       lambda facts: agreement_estimate(facts.votes, ties=True) or NO_TWO,
       advice="If this is far below `agreement`, annotators disagree on what counts as a tie: define it in the "
              "guideline.")

metric("alpha", "agreement", "number", JUDGED_PAIRS,
       "Krippendorff's alpha (first better < tie < second better, ordinal): 1 is full agreement, 0 is chance.",
       _alpha,
       advice="Proceed as for `agreement`: without ties alpha is 2 x agreement - 1. Krippendorff asks for 0.67 for "
              "tentative conclusions; preferences seldom reach it.")

metric("kendall-tau", "agreement", "number", "prompts with K >= 3 answers ranked by two or more annotators",
       "Kendall's tau-b between two annotators' rankings of the same answers: 1 is equal, 0 is chance, -1 is reversed.",
       lambda facts: bootstrapped(facts.kendall[0], ratio, len(facts.kendall[0])) or NO_BLOCK,
       advice="Proceed as for `agreement`. If annotators agree on the best answer but not on the rest, rank fewer "
              "answers.")

metric("kendall-w", "agreement", "number", "prompts with K >= 3 answers ranked by two or more annotators",
       "Kendall's W, the concordance of all rankings of the same answers: 1 is equal; chance is 1 / annotators.",
       lambda facts: bootstrapped(facts.kendall[1], ratio, len(facts.kendall[1])) or NO_BLOCK,
       advice="Proceed as for `agreement`, and compare it with 1 / annotators instead of 0.")

metric("ceiling", "agreement", "fraction", SHARED_PAIRS,
       "Upper bound on the accuracy of a reward model against the choice of a single annotator.",
       lambda facts: ceiling_estimate(facts.votes) or NO_TWO,
       advice="Expect no higher accuracy on single judgements; aggregate several judgements per pair for a cleaner "
              "test set.")

# ---- annotators -----------------------------------------------------------------------------------------------------

def _listed(names: list[str], n: int) -> Estimate:
    """The number of names, with the first five as a note."""
    return Estimate(float(len(names)), n=n, note=", ".join(names[:5]) + ", ..." * (len(names) > 5))


def _with_verdict(verdict: str) -> Callable[[Facts], Found]:
    def measure(facts: Facts) -> Found:
        judged = [one for one in facts.annotators if one.verdict != "unclear"]
        if not judged:
            return "too few pairs were judged by several annotators to recognise one who clicks at random"
        return _listed([one.name for one in judged if one.verdict == verdict], len(judged))

    return measure


def _one_sided(facts: Facts) -> Found:
    known = [one for one in facts.annotators if one.first is not None]
    if not known:
        return "no ranking by a named annotator records the display order"
    return _listed([one.name for one in known if one.one_sided], len(known))


def _busiest(facts: Facts) -> Found:
    total = sum(one.rankings for one in facts.annotators)
    if not total:
        return NO_NAMES
    busiest = max(facts.annotators, key=lambda one: one.rankings)
    return Estimate(busiest.rankings / total, n=total, note=busiest.name)


metric("annotators", "annotators", "number", "rankings", "Named annotators.",
       lambda facts: (Estimate(float(len(facts.annotators)), n=len(facts.columns)) if facts.annotators else NO_NAMES),
       advice="With few annotators the reward model learns the taste of few people; see the table of annotators.")

metric("random-annotators", "annotators", "count", COMPARED,
       "Annotators who agree with the others less than those do with each other, and no more than random clicks would.",
       _with_verdict("random"),
       bad=">0",
       advice="Look at their work and their time per ranking. Remove it with `rlhf data filter --where`, or give it "
              "less weight with `rlhf data aggregate`.")

metric("reversed-annotators", "annotators", "count", COMPARED,
       "Annotators who disagree with the others more than chance would.",
       _with_verdict("reversed"),
       bad=">0",
       advice="Check whether the tool or the import reversed their ranks (5 = best).")

metric("one-sided-annotators", "annotators", "count", "annotators with a known display order",
       "Annotators who prefer the answer shown first, or last, more than chance allows.",
       _one_sided,
       look=">0",
       advice="If the display order was shuffled, they click on one side. If it was not (one model is always first), "
              "they may prefer that model.")

metric("busiest-annotator", "annotators", "fraction", "rankings by named annotators",
       "Rankings by the annotator who made the most.",
       _busiest,
       look=">0.8",
       advice="Distribute the work: the reward model learns the taste of this annotator.")

# ---- texts ----------------------------------------------------------------------------------------------------------

def _median(chars: np.ndarray) -> Found:
    return Estimate(float(np.median(chars)), n=len(chars)) if len(chars) else NO_ANSWER


def _languages(facts: Facts) -> Found:
    found = facts.languages.prompts
    if not found:
        return "no prompt is long enough to identify its language"
    return _listed([code for code, times in found.most_common() if times >= found.total() / 50], found.total())


LENGTH_ADVICE = "Choose a maximum length for training that cuts few {}; the table of lengths shows the 95th percentile."
metric("prompt-length", "texts", "number", "records", "Median length of a prompt in characters, all turns together.",
       lambda facts: _median(facts.columns.prompt_chars),
       kinds=ANY, advice=LENGTH_ADVICE.format("prompts"))

metric("answer-length", "texts", "number", "answers", "Median length of an answer in characters.",
       lambda facts: _median(facts.columns.chars),
       kinds=WITH_ANSWERS, advice=LENGTH_ADVICE.format("answers"))

metric("languages", "texts", "number", "prompts long enough to identify their language",
       "Languages of at least one in fifty prompts.",
       _languages,
       kinds=ANY, sampled="languages",
       advice="Check that the base model and the annotators know these languages.")

metric("answers-in-another-language", "texts", "fraction", "best answers long enough to identify their language",
       "Best answers in another language than their prompt.",
       lambda facts: facts.languages.other or "no prompt and answer are long enough to identify their language",
       kinds=WITH_ANSWERS, sampled="languages", look=">0.05", bad=">0.2",
       advice="Look at these prompts: translation tasks are fine, a model that switches to English is not.")
