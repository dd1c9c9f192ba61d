"""Promise: the data pipeline keeps a trace only if its template, its answer and its observation hold; it says why it
drops each other one; and whatever stops it, nothing finished is done again and nothing is lost."""
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data
import sft
from data import CotSettings, cot, read_records, to_record
from rewards import parse
from serving import Fault, completion, serving, text_of

ROOT = Path(__file__).parent.parent
INPUT = data.TOY_INPUT


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows_of(toy):
    return json.loads((toy / "sft.json").read_text())


def settings(toy, out, **changes):
    return CotSettings(**INPUT | dict(data=str(toy / "sft.json"), out=str(out)) | changes)


# ------------------------------------------------------------------------------------------------ the three steps

def test_a_faultless_teacher_loses_nothing(toy, tmp_path, capsys):
    """And its traces are the toy world's own."""
    kept = cot(settings(toy, tmp_path, mistakes=0.0))
    assert [tuple(r.trace.values()) for r in read_records(kept, traces=True)] == [
        (row["observation"], row["process"]) for row in rows_of(toy)]
    assert "40 of 40 traces are kept for SFT" in capsys.readouterr().out


def test_the_result_is_the_released_format(toy, tmp_path):
    row = lines(cot(settings(toy, tmp_path)))[0]
    assert {"problem_id", "problem", "options", "problem_type", "solution", "answer", "path", "data_type",
            "data_source", "observation", "process", "output", "reward", "select"} <= set(row)
    assert row["select"] is True and row["reward"] == 1.0 and row["data_source"] == "toy"
    parsed = parse(row["output"])
    assert [*parsed.contents.values()][:2] == [row["observation"], row["process"]]


def test_the_filters_catch_the_teachers_mistakes_and_nothing_else(toy, tmp_path, capsys):
    """Half of all traces have wrong letters, half reason wrongly, a tenth is cut off."""
    cot(settings(toy, tmp_path, mistakes=0.5))
    own = {row["path"]: row for row in rows_of(toy)}
    kept, dropped = lines(tmp_path / "traces.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert len(kept) + len(dropped) == 40 and not any(row["select"] for row in dropped)
    for row in kept:
        assert all(row[name] == own[row["path"]][name] for name in ("observation", "process", "answer"))
    for row in dropped:                                      # each has a mistake, and the step that is there for it
        parsed = parse(row["output"])
        seen, answer = parsed.contents["observation"], parsed.contents["answer"]
        wrong = {"template broken": not all(parsed.formats), "answer wrong": answer != own[row["path"]]["answer"],
                 "observation insufficient": seen != own[row["path"]]["observation"]}
        assert wrong[row["reason"]], row
    reasons = Counter(row["reason"] for row in dropped)
    assert {"answer wrong", "observation insufficient"} <= reasons.keys()
    counts = [int(n) for n in re.findall(r"^[a-z]+ +(\d+)$", capsys.readouterr().out, re.M)]
    assert counts[0] == 40 and counts == sorted(counts, reverse=True) and counts[-1] == len(kept)


def test_a_teachers_mistakes_come_at_the_rate_that_was_asked_for():
    rows = [data.toy_record(random.Random(i), i, "many")[0] for i in range(1500)]
    records = [to_record(row, True) for row in rows]
    s = CotSettings(**INPUT, mistakes=0.2)
    drafts = [data.toy_draft(r, s) for r in records]
    wrong = sum(draft != data.trace_text(r, "p2r") for r, draft in zip(records, drafts))
    assert wrong / 1500 == pytest.approx(1 - 0.8 * 0.8 * 0.96, abs=0.04)


def test_sft_reads_the_result(toy, base, tmp_path, capsys):
    kept = cot(settings(toy, tmp_path))
    sft.main(["--preset", "tiny", "--out", str(tmp_path / "run"), "--model", str(base), "--data", str(kept), "--media",
              str(toy), "--steps", "1", "--batch", "4"])
    assert "sft: held-out loss" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ it survives

def http_settings(toy, out, server, **changes):
    return settings(toy, out, **dict(teacher=server.url, teacher_model="t", judge=server.url, judge_model="j",
                                     refuse_leaks=False, retries=0, concurrency=4, min_pixels=784, max_pixels=784)
                    | changes)


def answers(toy):
    """A server that is teacher and judge: writes the world's own traces, and says Yes to colours it knows."""
    own = {"\n".join([row["problem"], *row["options"]]): data.trace_text(to_record(row, True), "p2r")
           for row in rows_of(toy)}

    def play(number, request):
        text = text_of(request)
        if request["model"] == "t":
            return next(trace for asked, trace in own.items() if all(part in text for part in asked.split("\n")))
        red = "red" in text.split("JSON string: ")[1].split("\n")[0]
        return f"Any red? <judgement>{'No' if red else 'Yes'}</judgement>"
    return play


def test_teacher_and_judge_behind_http(toy, tmp_path):
    with serving(answers(toy), delay=0.02) as server:
        cot(http_settings(toy, tmp_path, server))
    teacher = [r for r in server.requests if r["model"] == "t"]
    assert len(teacher) == 40 and server.most_under_way == 4
    pictures = [part for part in teacher[0]["messages"][0]["content"] if part["type"] == "image_url"]
    assert len(pictures) == 6 and teacher[0]["temperature"] == 0
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0]["image_url"]["url"].split("base64,")[1])))
    assert picture.size == (28, 28), "as large as the model's own frames"
    assert len([r for r in server.requests if r["model"] == "j"]) >= 1
    kept, dropped = lines(tmp_path / "traces.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert kept and dropped and all("red" not in row["observation"] for row in kept)
    assert {row["reason"] for row in dropped} <= {"observation insufficient", "answer wrong"}


THOUGHTS = ["<think>First, what is seen?</think>\n", "First, what is seen?\n</think>\n\n", "\n<think>\n\n</think>",
            "<think>I shall write <observation>…</observation><think>…</think>.</think>"]


@pytest.mark.parametrize("thought", THOUGHTS)
def test_a_teachers_own_reasoning_is_removed_before_the_template_is_checked(thought, toy, tmp_path):
    well = answers(toy)

    def thinks(number, request):
        return thought * (request["model"] == "t") + well(number, request)
    for name, play in (("plain", well), ("thinks", thinks)):
        with serving(play) as server:
            cot(http_settings(toy, tmp_path / name, server))
    for file in ("traces.jsonl", "dropped.jsonl"):
        assert (tmp_path / "thinks" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert thought in lines(tmp_path / "thinks" / "1-generated.0.jsonl")[0]["output"], "what it wrote is kept"
    assert not all(parse(thought + "<observation>o</observation><think>t</think><answer>a</answer>").formats), \
        "a policy's is not removed"


@pytest.mark.parametrize("text", [
    "<think>t</think><answer>A</answer>", "<think>t <observation>o</observation><think>t</think><answer>A</answer>",
    "<think>t</think>Here: <observation>o</observation><think>t</think><answer>A</answer>",
    "Here: <observation>o</observation><think>t</think><answer>A</answer>",
    "<observation>o</observation><think>t</think><observation>o</observation><think>t</think><answer>A</answer>",
    "<think>t</think><observation>o</observation><answer>A</answer>"])
def test_what_is_no_reasoning_before_the_template_breaks_it(text, toy, tmp_path):
    with serving(lambda n, request: text) as server:
        assert lines(cot(http_settings(toy, tmp_path, server, limit=2))) == []
    assert {row["reason"] for row in lines(tmp_path / "dropped.jsonl")} == {"template broken"}


def test_a_trace_that_was_cut_off_breaks_the_template_and_one_without_text_is_asked_for_again(toy, tmp_path, capsys):
    texts = ["<observation>o</observation><think>t", None]
    with serving(lambda n, request: Fault(body=completion(texts[n], "length"))) as server:
        cot(http_settings(toy, tmp_path, server, limit=2, concurrency=1))
    said = capsys.readouterr().out
    assert [row["reason"] for row in lines(tmp_path / "dropped.jsonl")] == ["template broken", "not generated"]
    assert "1 records are unfinished" in said and "--max-response" in said
    assert [row["output"] for row in lines(tmp_path / "1-generated.0.jsonl")] == texts[:1]


def test_it_never_sends_what_should_stay_secret(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-teacher-secret")
    monkeypatch.setenv("JUDGE_API_KEY", "sk-judge-secret")
    with serving(answers(toy)) as server:
        cot(http_settings(toy, tmp_path, server))
    for headers, request in zip(server.headers, server.requests):
        assert headers["Authorization"] == f"Bearer sk-{'teacher' if request['model'] == 't' else 'judge'}-secret"
    printed = capfd.readouterr()
    assert "secret" not in printed.out + printed.err + "".join(f.read_text() for f in tmp_path.rglob("*.json*"))


def test_an_outage_ends_the_run_and_nothing_is_asked_twice(toy, tmp_path):
    well = answers(toy)
    with serving(lambda n, request: well(n, request) if n < 9 else Fault(503, body=b"down")) as server:
        with pytest.raises(ValueError, match="20 of 40 failed, most often for HTTP 503.*The rest is kept"):
            cot(http_settings(toy, tmp_path, server, concurrency=1))
    assert len(lines(tmp_path / "1-generated.0.jsonl")) == 9 and not (tmp_path / "traces.jsonl").exists()
    with serving(well) as again:                             # the server comes back, at another address
        cot(http_settings(toy, tmp_path, again))
    assert len([r for r in again.requests if r["model"] == "t"]) == 31


def test_a_few_failures_are_told_and_tried_again_by_the_next_run(toy, tmp_path, capsys):
    well = answers(toy)
    with serving(lambda n, request: Fault(500) if n % 9 == 4 else well(n, request)) as server:
        cot(http_settings(toy, tmp_path, server))
        asked, said = len(server.requests), capsys.readouterr().out
    reasons = {row["reason"] for row in lines(tmp_path / "dropped.jsonl")}
    assert "are unfinished" in said and {"not generated", "not judged"} <= reasons
    with serving(well) as server:
        cot(http_settings(toy, tmp_path, server))
        assert "unfinished" not in capsys.readouterr().out
        assert len(server.requests) < asked, "only what failed is asked again"
        cot(http_settings(toy, tmp_path / "clean", server))
    assert (tmp_path / "traces.jsonl").read_bytes() == (tmp_path / "clean" / "traces.jsonl").read_bytes()


def test_a_judge_that_is_never_understood_stops_the_work(toy, tmp_path):
    """And another one may take over, since no verdict has been given yet."""
    well = answers(toy)
    with serving(lambda n, request: well(n, request) if request["model"] == "t" else "Hm.") as server:
        with pytest.raises(ValueError, match="20 of .* failed, most often for no verdict at the end of the reply"):
            cot(http_settings(toy, tmp_path, server, concurrency=1))
        asked = len(server.requests)
        cot(http_settings(toy, tmp_path, server, judge="rule", judge_model=""))
        assert len(server.requests) <= asked + 1, "the teacher's work is kept; one request was under way"


def test_kill_it_at_any_moment(toy, tmp_path):
    """SIGKILL, then Ctrl-C, while requests are under way. At the end: the same files as without, and no request
    repeated except the two that were under way at each."""
    moments = random.Random(0)
    with serving(answers(toy), delay=0.05) as server:
        command = [sys.executable, str(ROOT / "data.py"), "cot", "--data", str(toy / "sft.json"), "--out",
                   str(tmp_path / "killed"), "--teacher", server.url, "--teacher-model", "t", "--judge", server.url,
                   "--judge-model", "j", "--concurrency", "2", "--frames", "2", "--max-pixels", "784", "--min-pixels",
                   "784", "--no-refuse-leaks"]
        for least, stop in ((8, signal.SIGKILL), (45, signal.SIGINT)):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.requests) < least:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(stop)
            process.wait()
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        killed = len(server.requests)
        command[command.index("--out") + 1] = str(tmp_path / "whole")
        data.main(command[2:])
        whole = len(server.requests) - killed
    assert killed - whole <= 4
    for name in ("traces.jsonl", "dropped.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_pipeline_only_prints_its_funnel(toy, tmp_path, capsys, monkeypatch):
    kept = cot(settings(toy, tmp_path))
    first, text = capsys.readouterr().out, kept.read_text()
    monkeypatch.setattr(data, "toy_draft", lambda *_: pytest.fail("nothing is left to generate"))
    assert cot(settings(toy, tmp_path)).read_text() == text and capsys.readouterr().out == first


def test_other_settings_are_other_work(toy, tmp_path):
    first = cot(settings(toy, tmp_path)).read_bytes()
    assert cot(settings(toy, tmp_path, mistakes=0.5)).read_bytes() != first
    assert cot(settings(toy, tmp_path)).read_bytes() == first and len(lines(tmp_path / "1-generated.0.jsonl")) == 80


def test_a_damaged_line_is_named_and_a_cut_one_is_done_again(toy, tmp_path):
    kept = cot(settings(toy, tmp_path)).read_bytes()
    journal = tmp_path / "1-generated.0.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    assert cot(settings(toy, tmp_path)).read_bytes() == kept and len(lines(journal)) == 40
    journal.write_bytes(whole[:30] + b"\n" + whole[30:])
    with pytest.raises(ValueError, match="1-generated.0.jsonl, line 1: not JSON"):
        cot(settings(toy, tmp_path))


def test_media_that_cannot_be_read_are_a_reason_and_can_be_repaired(toy, tmp_path, capsys):
    world = tmp_path / "world"
    rows = rows_of(toy)[:6]
    (world / "sft").mkdir(parents=True)
    for row in rows[1:]:
        os.link(toy / row["path"], world / row["path"])
    (world / "sft.json").write_text(json.dumps(rows))
    with serving(answers(toy)) as server:
        s = http_settings(world, tmp_path / "out", server, judge="rule", judge_model="")
        cot(s)
        assert "1 records are unfinished (most often: media: no such file)" in capsys.readouterr().out
        assert [row["reason"] for row in lines(tmp_path / "out/dropped.jsonl")].count("not generated") == 1
        os.link(toy / rows[0]["path"], world / rows[0]["path"])
        cot(s)
    assert "unfinished" not in capsys.readouterr().out


def test_the_reference_judges_blind(toy, started, tmp_path):
    s = settings(toy, tmp_path / "cot", judge="reference", judge_model=str(started), max_response=48, batch=8, mistakes=0.0)
    first = cot(s).read_bytes()
    judged = lines(tmp_path / "cot" / "3-judged.0.jsonl")
    assert judged and all(row["explanation"].startswith("answering blind: ") for row in judged)
    again = cot(replace(s, out=str(tmp_path / "again"), batch=16)).read_bytes()
    assert again == first, "greedy, whatever the batch"


# ------------------------------------------------------------------------------------------------ the command

def test_without_data_it_makes_the_toy_world(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.make_toy, "__defaults__", ({"sft": 12}, 0))
    data.main(["cot", "--out", str(tmp_path / "cot")])
    assert "traces are kept for SFT" in capsys.readouterr().out and (tmp_path / "toy" / "sft.json").is_file()


@pytest.mark.parametrize("flags, complaint", [
    (["--teacher", "toy"], "The toy teacher and the rule judge know toy records only"),
    (["--teacher", "https://host/v1", "--teacher-model", "t"], "The toy teacher and the rule judge know toy records"),
    (["--judge", "https://:secret@host/v1", "--judge-model", "m"], "keys come from the environment"),
    (["--concurrency", "0"], "--concurrency must be at least 1"), (["--retries", "-1"], "--retries must be at least 0"),
    (["--teacher", "nowhere"], "--teacher nowhere: neither toy nor an address"),
    (["--judge", "."], "--judge .: neither rule, reference nor an address"),
    (["--teacher", "http://127.0.0.1:9/v1"], "--teacher http://127.0.0.1:9/v1 needs --teacher-model"),
    (["--judge", "reference"], "--judge reference needs --judge-model")])
def test_what_cannot_work_is_said_in_a_line(tmp_path, flags, complaint):
    record = dict(problem="What is it?", problem_type="free-form", solution="a cat", path="a.png", data_type="image")
    (tmp_path / "mine.json").write_text(json.dumps([record]))
    with pytest.raises(SystemExit) as ended:
        data.main(["cot", "--data", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), *flags])
    assert complaint in str(ended.value) and "secret" not in str(ended.value)
    assert not list(tmp_path.rglob("*.jsonl"))
