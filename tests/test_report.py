"""Promise: a run ends with one page that needs nothing else, and what it shows is what happened in the run. The page is
also looked at by a browser: tests/render.py."""
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import data
import eval as evaluation
import pagrpo
import sft
from model import newest_checkpoint
from rewards import SEGMENTS
from test_resume import interrupt_in_step, rl_flags, same_end

BOARD = ("prompt", "response", "response_tokens", "logprobs", "ref_logprobs", "values", "token_rewards", "reward",
         "step")                                             # the keys that RLLoggingBoard reads
OF_TOKENS = ("response_tokens", "logprobs", "logprobs_after", "ref_logprobs", "values", "token_rewards", "weights",
             "segments")


class Page(HTMLParser):
    """What a browser would load, and the data in the page."""

    def __init__(self, file):
        super().__init__()
        self.text, self.inside, self.loads, self.texts = file.read_text(encoding="utf-8"), [], [], {}
        self.feed(self.text)
        self.run, *self.others = json.loads(self.texts["runs"], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside.append(attributes.get("id", tag))
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_endtag(self, tag):
        self.inside.append("")

    def handle_data(self, text):
        if self.inside:
            self.texts[self.inside[-1]] = self.texts.get(self.inside[-1], "") + text


@pytest.fixture(scope="module")
def run(toy, started, tmp_path_factory):
    """The folder of a run of three steps, each of them recorded."""
    out = tmp_path_factory.mktemp("report")
    pagrpo.main(rl_flags(out, toy, newest_checkpoint(started), steps=3, questions=4, group_size=4, max_response=40,
                         transcript_every=1, clip_norm="inf"))
    return out / "pagrpo"


@pytest.fixture(scope="module")
def page(run):
    return Page(run / "report.html")


def rows_of(folder, name="rollouts.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_page_needs_no_other_file_and_no_network(page):
    assert page.loads == [], "nothing is loaded; frames are in the data"
    style = page.texts["style"]
    assert not re.search(r"url\(|@import", style) and "http" not in page.text.replace(page.texts["runs"], "")
    assert len(page.text.encode()) < 5_000_000
    frames = [frame for clip in page.run["clips"].values() for frame in clip]
    assert frames and all(frame.startswith("data:image/jpeg;base64,") for frame in frames)


def test_every_token_shows_the_advantage_that_the_loss_gave_it(run, page):
    """Computed again from the rewards on the page, through the functions of the training."""
    groups = page.run["rollouts.jsonl"]["groups"]
    assert [len(group) for group in groups] == [4, 4, 4] and [group[0]["step"] for group in groups] == [1, 2, 3]
    for group in groups:
        totals = torch.tensor([row["totals"] for row in group])[None]                     # (1, G, K)
        parts = torch.tensor([row["parts"] for row in group])[None]                       # (1, G, K, 3)
        assert torch.allclose(totals, pagrpo.total_rewards(parts, "none"), atol=1e-4)
        for mode in pagrpo.STAGES:
            advantages = pagrpo.group_advantages(totals, mode)
            for g, row in enumerate(group):
                assert row["advantages"][mode] == pytest.approx(advantages[0, g].tolist(), abs=1e-3)
        advantages = pagrpo.group_advantages(totals, page.run["settings"]["advantage"])
        for g, row in enumerate(group):
            segments = torch.tensor([[row["segments"]]])                                  # (1, 1, T)
            expected = pagrpo.token_advantages(advantages[:, [g]], segments).flatten().tolist()
            assert row["token_rewards"] == pytest.approx(expected, abs=1e-3)
    assert any(x for group in groups for row in group for x in row["token_rewards"]), "not all are 0"


def test_the_rows_are_those_that_viewers_of_rollouts_read(run):
    rows = rows_of(run)
    for row in rows:
        assert set(BOARD) <= row.keys() and len({len(row[name]) for name in OF_TOKENS}) == 1
        assert "".join(row["response_tokens"]).removesuffix("<|im_end|>") == row["response"]
        assert set(row["segments"]) <= {*range(len(SEGMENTS) + 1)} and sum(row["weights"]) == pytest.approx(1, abs=1e-3)
        assert row["reward"] == pytest.approx(sum(row["totals"]), abs=1e-4)
    assert any(row["logprobs"] != row["logprobs_after"] for row in rows), "the update changed something"


def test_the_scores_after_an_update_are_those_of_the_updated_model(toy, run):
    """Its last checkpoint gives the last group the log-probabilities that were recorded after the last update."""
    vocabulary, policy, _ = data.load_local(newest_checkpoint(run))
    settings = pagrpo.Settings(**{k: tuple(v) if isinstance(v, list) else v
                                  for k, v in sft.read_json(run / "settings.json").items()})
    readable = [row for row in rows_of(run)[-4:] if "\ufffd" not in "".join(row["response_tokens"])]
    assert readable, "single bytes of a character have no text by which they could be found again"
    for row in readable:
        record = next(r for r in data.read_records(toy / "rl.json") if r.problem_id == row["problem_id"])
        example = data.build_example(record, toy, vocabulary, policy.config, settings)
        ids = [vocabulary.bytes.index(text.encode()) for text in row["response_tokens"]]
        tokens, lengths = torch.tensor([[ids]]), torch.tensor([[len(ids)]])
        logprobs, _ = policy.logprobs(data.collate([example]), tokens, lengths)
        assert logprobs.flatten().tolist() == pytest.approx(row["logprobs_after"], rel=1e-3, abs=1e-3)


def test_one_question_is_answered_at_every_recorded_step(run):
    rows = rows_of(run, "question.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert len({row["problem_id"] for row in rows}) == 1 and rows[0]["problem_id"].startswith("heldout")


def fail(*_):
    raise OSError("the disk is full")


def test_recording_changes_nothing_and_a_resumed_run_has_no_row_twice(toy, base, tmp_path, monkeypatch):
    """The same run three times: recorded once in the beginning and at the end, at each step, and at each step with a
    kill in between, after which a step is taken again."""
    pagrpo.main(rl_flags(tmp_path / "seldom", toy, base, heldout="", steps=4))
    pagrpo.main(rl_flags(tmp_path / "often", toy, base, heldout="", steps=4, transcript_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(sft.Run, "log", fail)                  # behind the rows of step 1
        with pytest.raises(SystemExit):
            pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    assert {row["step"] for row in rows_of(tmp_path / "killed/pagrpo")} == {1}
    os.truncate(tmp_path / "killed/pagrpo/rollouts.jsonl", 50)                # a kill cuts a file's only line
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(SystemExit, match="topped after step 3"):
            pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    pagrpo.main(rl_flags(tmp_path / "killed", toy, base, heldout="", steps=4, transcript_every=1))
    seldom, often, killed = (tmp_path / name / "pagrpo" for name in ("seldom", "often", "killed"))
    assert same_end(seldom, often) and same_end(often, killed)
    for name in ("rollouts.jsonl", "question.jsonl"):
        assert rows_of(often, name) == rows_of(killed, name)
        assert [row for row in rows_of(often, name) if row["step"] in (1, 4)] == rows_of(seldom, name)


def test_a_response_cannot_break_out_of_its_place(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rows = rows_of(run)
    rows[0] |= {"response_tokens": ["</script><script>alert(1)</script>", "<!--", "\u2028"], "judge": "</SCRIPT >"}
    data.write_rows(tmp_path / "run/rollouts.jsonl", rows)
    page = Page(sft.write_report(tmp_path / "run"))
    assert page.run["rollouts.jsonl"]["groups"][0][0]["response_tokens"] == rows[0]["response_tokens"]
    assert page.text.lower().count("</script") == 2, "those of the template"


def test_a_long_run_is_thinned_until_the_page_is_small(run, tmp_path):
    """30 recorded groups of 4 responses with up to 1,000 tokens: more rows than a page can hold."""
    shutil.copytree(run, tmp_path / "run")
    group = rows_of(run)[:4]
    for row in group:
        row |= {name: (row[name] * 100)[:1000] for name in OF_TOKENS}
    data.write_rows(tmp_path / "run/rollouts.jsonl", [row | {"step": step} for step in range(1, 31) for row in group])
    page = Page(sft.write_report(tmp_path / "run"))
    shown = page.run["rollouts.jsonl"]
    assert len(page.text.encode()) < 5_000_000 and shown["steps"] == 30 and 2 <= len(shown["groups"]) < 24
    assert [shown["groups"][0][0]["step"], shown["groups"][-1][0]["step"]] == [1, 30]
    assert sft.thin([*range(10)], 4) == [0, 3, 6, 9] and sft.thin([1, 2], 4) == [1, 2] and sft.thin([1, 2], 0) == []


def test_sft_has_a_page_and_a_second_run_is_laid_over_the_first(run, started, capsys, tmp_path):
    page = Page(started / "report.html")
    assert page.run["metrics"][-1]["step"] == 40 and not page.run["rollouts.jsonl"]["groups"] and not page.others
    shutil.copytree(run, tmp_path / "a")
    evaluation.main(["--report", str(tmp_path / "a"), str(started)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a/report.html")
    page = Page(tmp_path / "a/report.html")
    assert page.others[0]["metrics"][-1]["step"] == 40 and page.others[0]["settings"]["batch"] == 32
    with pytest.raises(SystemExit, match="holds no run"):
        evaluation.main(["--report", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluation.main(["--report", "a", "b", "c"])


def test_the_page_knows_how_the_run_was_made(run, page):
    made = page.run["state"]["made_by"]
    assert made["torch"] == torch.__version__ and made["command"].startswith("python ") and "commit" in made
    assert page.run["settings"]["lr"] and page.run["state"]["steps"] == 3
    crossed = page.run["results"]["pagrpo, greedy"]["answer"]["crossed"]
    assert sum(map(sum, crossed)) == 20 and sum(row[0] for row in crossed) == pytest.approx(
        0.2 * page.run["results"]["pagrpo, greedy"]["answer"]["value"])


@pytest.mark.parametrize("think, answer, wanted", [
    ("red O no, next blue T, A red X no, B blue T yes", "B", 0.0), ("next blue T, B blue T yes", "A", 1.0),
    ("first a letter, then another", "B", None), ("B blue T yes", "neither", None)])
def test_a_mismatch_is_an_answer_other_than_what_the_reasoning_ends_on(think, answer, wanted):
    record = data.Record("", "Which?", ("A. red X", "B. blue T"), "multiple choice", "B", "", "video")
    text = f"<observation> 1 red O </observation>\n<think> {think} </think>\n<answer> {answer} </answer>"
    blank = data.Example(record, *[None] * 6)
    response = pagrpo.Response(blank, [], [], torch.zeros(0), True, text, pagrpo.rewards.parse(text))
    assert pagrpo.think_differs(response) == wanted
    counted = replace(response, example=blank._replace(record=replace(record, problem_type="numerical")))
    assert pagrpo.think_differs(counted) is None
