"""The report: every metric with a value, a meaning and a place on the page; rules; text of users is never code."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from check_rows import panel, ranking
from chromium import CONTRAST, UNREADABLE, Chromium, needs_chromium
from rows import dataset, jsonl, last_line, prompts, run, write

from data_tools.check.brief import show_brief
from data_tools.check.metrics import METRICS
from data_tools.check.page import render
from data_tools.check.report import GRADES, check
from data_tools.check.rules import grade, parse_rules
from data_tools.check.show import PARTS, advice
from data_tools.statistics.accumulator import accumulated
from data_tools.statistics.intervals import Estimate
from rlhf.core.errors import UserError
from rlhf.data.jsonl import to_dict
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.store import open_dataset

EVIL = "<script>alert('x')</script> & <b>\"bold\"</b> {{ 7 * 7 }}"

POLITE = "Write me an answer of a sentence or two, in plain English, if you please, and be kind about it all the while."


def everything():
    """Rankings of which every metric can be taken."""
    people = dict.fromkeys("abcdef", 0.85) | {"click": 0.5}
    rows = []
    for number, row in enumerate(panel(90, people, k=3, each=4, seed=2)):
        by_text = sorted(row.candidates, key=lambda c: c.text)
        candidates = tuple(
            Candidate(_sentence(c.text), f"author {place}", "person" if place else "model")
            for place, c in enumerate(by_text)
        )
        text = f"{row.messages[0].content} {POLITE}"
        more = {"annotator": row.annotator, "shown": True, "seconds": 5.0 + number % 7}
        ranks = [row.ranks[row.candidates.index(c)] for c in by_text]
        split = "eval" if int(re.findall(r"\d+", text)[0]) % 5 == 0 else "train"
        rows.append(ranking(text, candidates, ranks, split=split, **more))
    again = rows[0]
    return [
        *rows,
        Ranking(again.messages, candidates=again.candidates, ranks=again.ranks[::-1], annotator=again.annotator),
    ]


def _sentence(text):
    more = "so " * (sum(map(ord, text)) % 7)
    return f"The {text} is a sentence of some length that ends after {more}many words. {POLITE}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of `everything`, and an evaluation set."""
    folder = tmp_path_factory.mktemp("check")
    jsonl(folder / "e.jsonl", [{"prompt": "Who?"}])
    write(folder / "d", everything())
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return check(folder / "d", against=[folder / "e.jsonl"])


@pytest.fixture(scope="module")
def page(whole):
    return render(whole)


# ---- the table of metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_every_metric_has_a_value_a_meaning_and_a_place_on_the_page(row, whole, page):
    measured = whole[row.name]
    assert measured.found is not None, measured.why
    assert measured.grade in GRADES
    assert measured.found.n > 0
    if row.unit == "fraction":
        assert 0 <= measured.found.value <= 1
    if measured.found.low is not None:
        assert measured.found.low <= measured.found.value <= measured.found.high
    assert row.summary.endswith(".")
    assert row.advice.endswith(".")
    assert row.part in PARTS
    assert f'id="{row.name}"' in page
    assert whole.as_dict()["metrics"][row.name]["value"] == round(measured.found.value, 6)
    assert f"{row.name}:" in run("check", "--help").output


def test_fractions_have_intervals(whole):
    exact = {"duplicate-records", "repeated-answers", "busiest-annotator"}  # counted over all there is
    shares = {m.name for m in whole.measured if m.metric.unit == "fraction" and m.found.low is None}
    assert shares == exact


def test_the_report_is_plain_json_and_the_same_every_time(folder, whole, page):
    assert json.loads(json.dumps(whole.as_dict()))["records"] == len(everything())
    assert render(check(folder / "d", against=[folder / "e.jsonl"])) == page


def test_a_file_gives_the_figures_of_its_folder(tmp_path, folder, whole):
    file = jsonl(tmp_path / "d.jsonl", map(to_dict, everything()))
    with open(file, "a") as lines:
        lines.write("not a record\n")
    other = check(file, against=[folder / "e.jsonl"])
    assert whole.as_dict()["metrics"] == other.as_dict()["metrics"]
    assert other.bad_rows == {"not valid JSON": 1}


# ---- grades and rules -----------------------------------------------------------------------------------------------


def test_a_figure_is_bad_only_where_its_whole_interval_is():
    look, bad = (">0.6", "<0.4"), (">0.7",)
    assert grade(Estimate(0.8, 0.75, 0.85), look, bad) == "bad"
    assert grade(Estimate(0.8, 0.65, 0.95), look, bad) == "look"
    assert grade(Estimate(0.3, 0.2, 0.5), look, bad) == "look"
    assert grade(Estimate(0.5, 0.2, 0.9), look, bad) == "look", "the interval reaches what is bad"
    assert grade(Estimate(0.5, 0.2, 0.9), look, bad, census=True) == "good", "a count of what is there has no doubt"
    assert grade(Estimate(0.5, 0.45, 0.55), look, bad) == "good"
    assert grade(Estimate(0.8), look, bad) == "bad"
    assert grade(Estimate(0.8), (), ()) == "info"


def test_a_handful_of_judgements_is_not_good(tmp_path):
    rows = [ranking(p, ["x", "y", "z"], (1, 2, 3), by) for p in "pq" for by in ("ann", "ben")]
    report = check(write(tmp_path / "d", rows).path, near=False)
    for name, n in (("agreement", 6), ("ceiling", 6), ("contradictions", 6), ("cycles", 2)):
        found = report[name].found
        assert (found.n, found.high > found.low) == (n, True), name
        assert report[name].grade != "good", name
    assert report["agreement"].found.value == 1
    assert report["agreement"].found.low < 0.5, "two prompts that agree do not show that annotators do"
    assert report["kendall-tau"].found.low is None, "a bootstrap of two prompts has no honest interval"
    assert report["duplicate-records"].grade == "good", "a count of what is there has no doubt"
    assert "too little to be sure" in advice(report["agreement"])
    assert "too little to be sure" not in advice(report["duplicate-records"])


@pytest.mark.parametrize("sign, fires", [(">", False), (">=", True), ("==", True), ("<=", True), ("<", False)])
def test_a_rule_is_a_metric_an_operator_and_a_number(sign, fires):
    (rule,) = parse_rules([f" agreement {sign} 0.5 "], near=True, against=True)
    assert (rule.metric, rule.operator, rule.number) == ("agreement", sign, 0.5)
    assert rule.holds(0.5) == fires


@pytest.mark.parametrize("text", ["agreement", "agreement<", "agreement=0.5", "<0.5", "agreement<much", ""])
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(UserError):
        parse_rules([text], near=True, against=True)


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'contradictions'"):
        parse_rules(["contradiction>0.05"], near=True, against=True)


def test_a_rule_on_what_the_options_switch_off_is_refused():
    with pytest.raises(UserError, match="--no-near switches"):
        parse_rules(["near-duplicates-across-splits>0"], near=False, against=False)
    with pytest.raises(UserError, match="needs evaluation sets"):
        parse_rules(["contaminated-prompts>0"], near=True, against=False)


def test_rules_that_hold_give_exit_status_1_and_others_0(tmp_path):
    path = write(tmp_path / "d", panel(60, dict.fromkeys("abc", 0.8))).path
    result = run("check", path, "--fail-on", "agreement<0.99", "--fail-on", "ties>0", "--json")
    assert result.exit_code == 1
    said = last_line(result)
    assert (said["fired"], said["rules"], said["ok"]) == (["agreement<0.99"], ["agreement<0.99", "ties>0"], False)
    assert "agreement<0.99: fired: agreement is" in result.stdout
    result = run("check", path, "--fail-on", "ties>0", "--json")
    assert (result.exit_code, last_line(result)["ok"]) == (0, True)


def test_a_rule_that_cannot_be_tried_is_said_so(tmp_path):
    result = run(
        "check", write(tmp_path / "d", [ranking("p", "xy", (1, 2))]).path, "--fail-on", "agreement<0.6", "--json"
    )
    assert result.exit_code == 0
    assert last_line(result)["without_value"] == ["agreement<0.6"]
    assert "not checked: no pair of answers was ordered by two named annotators" in result.output


# ---- the page -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_is_self_contained(page):
    found = Tags(page)
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(found.tags)
    assert all(link.startswith("#") for link in found.links)
    assert "http" not in re.sub(r'(xmlns(:\w+)?|http-equiv|[\w:]*resource)="[^"]*"', "", page)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert "default-src 'none'" in page


def test_plots_are_described_and_follow_the_pages_colours(page):
    plots = re.findall(r'<svg class="plot (?:wide|narrow)"[^>]*>', page)
    assert len(plots) == 2 * 4  # lengths, longer, authors, annotators; K is the same everywhere
    assert all('role="img"' in plot and "aria-label=" in plot for plot in plots)
    assert "currentColor" in page
    assert "#010203" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_and_the_letters_of_its_plots_fit(width, page, tmp_path):
    (tmp_path / "page.html").write_text(page, "utf-8")
    with Chromium() as browser:
        tab = browser.page((tmp_path / "page.html").as_uri(), width=width)
        assert tab.eval("document.documentElement.scrollWidth") <= width
        assert tab.eval(UNREADABLE) == [] and tab.eval(CONTRAST) == 0
        assert tab.faults() == []


def test_text_of_users_is_never_code(tmp_path):
    def evil(prompt, ranks, name):
        messages = (Message("user", f"{EVIL} {prompt}"),)
        candidates = (Candidate(f"{EVIL} x", f"{EVIL} m1 $\\frac$"), Candidate(f"{EVIL} y", "m2"))
        return Ranking(messages, candidates=candidates, ranks=ranks, annotator=name, split="train")

    rows = [evil(p, r, f"{EVIL} {n}") for p in "pqr" for n, r in (("a", (1, 2)), ("b", (2, 1)), ("b", (2, 1)))]
    report = check(write(tmp_path / "<i>d</i>", rows).path)
    assert {e.metric for e in report.examples} >= {"contradictions", "duplicate-records", "repeated-answers"}
    found = Tags(page := render(report))
    assert not {"script", "b", "i"} & set(found.tags)
    assert "&lt;script&gt;alert" in page
    assert "{{ 7 * 7 }}" in page


def test_names_in_any_script_are_drawn_without_a_word(tmp_path, recwarn):
    rows = [ranking(p, "xy", (1, 2), n) for p in "pqr" for n in ("安娜 😀", "null \0 and \u202e", "anna")]
    page = render(check(write(tmp_path / "d", rows).path))
    assert "安娜 😀</text>" in page
    assert "null \ufffd and \ufffd</text>" in page
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_the_page_is_written_only_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "d", panel(20, dict.fromkeys("abc", 0.8))).path
    before = sorted(tmp_path.rglob("*"))
    result = run("check", path)
    assert result.exit_code == 0
    assert "--html" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert run("check", path, "--html", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    for wrong in (tmp_path / "page.html" / "in-a-file", tmp_path / "d"):
        refused = run("check", path, "--html", wrong)
        assert isinstance(refused.exception, UserError) and refused.stdout == ""  # before anything is measured


@pytest.mark.parametrize("rows", [prompts(2), [{"prompt": "p", "answer": "a"}], [{"prompt": "p", "candidates": "xy"}]])
def test_small_datasets_of_every_kind_have_a_page(tmp_path, rows):
    rows = [{**row, "candidates": list(row["candidates"])} if "candidates" in row else row for row in rows]
    result = run("check", dataset(tmp_path / "d", rows), "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output


# ---- in brief -------------------------------------------------------------------------------------------------------


def brief(path):
    show_brief(accumulated(open_dataset(path)), path)


def test_the_brief_names_the_faults_in_a_few_lines(tmp_path, capsys):
    people = dict.fromkeys("abcdef", 0.9) | {"click": 0.5}
    rows = panel(150, people, k=3, each=4)
    brief(write(tmp_path / "d", [*rows, rows[0]]).path)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0] == "  150 prompts; answers to rank: 3 in 100.0%; 0.0% of pairs tied"
    assert "1 records (0.2%) repeat" in said.out
    assert "a reward model's accuracy on single judgements is at most" in said.out
    assert "click (random" in said.err


@pytest.mark.parametrize("rows", [prompts(3), [{"prompt": "p", "answer": "a"}]])
def test_the_brief_of_other_kinds_is_briefer(tmp_path, capsys, rows):
    brief(dataset(tmp_path / "d", rows))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_brief_says_when_nothing_is_known_of_agreement(tmp_path, capsys):
    brief(write(tmp_path / "d", [ranking(p, "xy", (1, 2), "a") for p in "pq"]).path)
    assert "no prompt was ranked twice" in capsys.readouterr().out
