"""Promise: the data pipeline keeps a trace only if its template, its answer and its observation hold; it says why it
drops each other one; and whatever stops it, nothing finished is done again and nothing is lost."""
import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest

import data
import sft
from data import CotSettings, cot, read_records
from rewards import parse, read_jsonl as lines
from serving import Fault, completion, serving, text_of
from toy_runs import command, flags


def settings(toy, out, **changes):
    return CotSettings(**data.TOY_INPUT | dict(data=str(toy / "sft.json"), out=str(out)) | changes)


def verified(record, output):
    return data.verify(record, {"output": output, "error": ""})


@pytest.fixture
def records(toy):
    return read_records(toy / "sft.json", traces=True)


# ------------------------------------------------------------------------------------------------ the three steps

def test_a_faultless_teacher_loses_nothing(toy, records, tmp_path, capsys):
    """And its traces are the toy world's own."""
    kept = cot(settings(toy, tmp_path, mistakes=0.0))
    assert [r.trace for r in read_records(kept, traces=True)] == [r.trace for r in records]
    assert "40 of 40 traces are kept for SFT" in capsys.readouterr().out


def test_the_result_is_the_released_format_and_sft_reads_it(toy, base, tmp_path, capsys):
    kept = cot(settings(toy, tmp_path))
    row, *_ = lines(kept)
    assert {"problem_id", "problem", "options", "problem_type", "solution", "answer", "path", "data_type",
            "data_source", "observation", "process", "output", "reward", "select"} <= set(row)
    sft.main(flags(preset="tiny", out=tmp_path / "run", model=base, data=kept, media=toy, steps=1, batch=4))
    assert "sft: held-out loss" in capsys.readouterr().out


def test_the_filters_catch_the_teachers_mistakes_and_nothing_else(toy, records, tmp_path, capsys):
    """Half of all traces have wrong letters, half reason wrongly, a tenth is cut off."""
    cot(settings(toy, tmp_path, mistakes=0.5))
    own = {r.path: r for r in records}
    kept, dropped = lines(tmp_path / "traces.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert len(kept) + len(dropped) == 40
    for row in kept:
        assert row == row | data.to_row(own[row["path"]])
    for row in dropped:                                      # each has a mistake, and the step that is there for it
        r, parsed = own[row["path"]], parse(row["output"])
        seen, _, answer = parsed.contents.values()
        wrong = {"template broken": not all(parsed.formats), "answer wrong": answer != r.reference,
                 "observation insufficient": seen != r.trace["observation"]}
        assert wrong[row["reason"]], row
    assert {"answer wrong", "observation insufficient"} <= {row["reason"] for row in dropped}
    counts = [int(n) for n in re.findall(r"^[a-z]+ +(\d+)$", capsys.readouterr().out, re.M)]
    assert counts[0] == 40 and counts == sorted(counts, reverse=True) and counts[-1] == len(kept)


def test_a_teachers_mistakes_come_at_the_rate_that_was_asked_for(records):
    s = CotSettings(**data.TOY_INPUT, mistakes=0.2)
    wrong = [data.toy_draft(r, replace(s, seed=seed)) != data.trace_text(r, "p2r")
             for r in records for seed in range(40)]
    assert sum(wrong) / len(wrong) == pytest.approx(1 - 0.8 * 0.8 * 0.96, abs=0.04)


@pytest.mark.parametrize("thought", [
    "<think>First, what is seen?</think>\n", "First, what is seen?\n</think>\n\n", "\n<think>\n\n</think>",
    "<think>I shall write <observation>…</observation><think>…</think>.</think>"])
def test_a_teachers_own_reasoning_is_removed_before_the_template_is_checked(thought, records):
    text = data.trace_text(records[0], "p2r")
    row = verified(records[0], thought + text)
    assert row == verified(records[0], text)
    assert not all(parse(thought + text).formats), "a policy's is not removed"


@pytest.mark.parametrize("text", [
    "<think>t</think><answer>A</answer>", "<think>t <observation>o</observation><think>t</think><answer>A</answer>",
    "<think>t</think>Here: <observation>o</observation><think>t</think><answer>A</answer>",
    "Here: <observation>o</observation><think>t</think><answer>A</answer>",
    "<observation>o</observation><think>t</think><observation>o</observation><think>t</think><answer>A</answer>",
    "<think>t</think><observation>o</observation><answer>A</answer>"])
def test_what_is_no_reasoning_before_the_template_breaks_it(text, records):
    assert verified(records[0], text)["reason"] == "template broken"


# ------------------------------------------------------------------------------------------------ servers

def http_settings(toy, out, server, **changes):
    return settings(toy, out, **dict(teacher=server.url, teacher_model="t", judge=server.url, judge_model="j",
                                     refuse_leaks=False, retries=0, concurrency=4) | changes)


@pytest.fixture
def well(records):
    """A server that is teacher and judge: writes the world's own traces, and says Yes to colours it knows."""
    def play(number, request):
        text = text_of(request)
        if request["model"] == "t":
            return next(data.trace_text(r, "p2r") for r in records
                        if all(part in text for part in (r.question, *r.options)))
        red = "red" in text.split("JSON string: ")[1].split("\n")[0]
        return f"Any red? <judgement>{'No' if red else 'Yes'}</judgement>"
    return play


def test_teacher_and_judge_behind_http(toy, well, tmp_path, monkeypatch, capfd):
    for name in ("teacher", "judge"):
        monkeypatch.setenv(f"{name.upper()}_API_KEY", f"sk-{name}-secret")
    with serving(well, delay=0.02) as server:
        cot(http_settings(toy, tmp_path, server))
    assert server.most_under_way == 4
    teacher = [r for r in server.requests if r["model"] == "t"]
    *pictures, _ = teacher[0]["messages"][0]["content"]
    assert (len(teacher), len(pictures), teacher[0]["temperature"]) == (40, 6, 0)
    kept, dropped = lines(tmp_path / "traces.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert kept and all("red" not in row["observation"] for row in kept)
    assert "observation insufficient" in {row["reason"] for row in dropped}
    for headers, request in zip(server.headers, server.requests):
        name = {"t": "teacher", "j": "judge"}[request["model"]]
        assert headers["authorization"] == f"Bearer sk-{name}-secret"
    written = [f.read_text() for f in tmp_path.rglob("*.json*")]
    assert "secret" not in "".join([*capfd.readouterr(), *written])


def test_a_trace_that_was_cut_off_breaks_the_template_and_one_without_text_is_asked_for_again(toy, tmp_path, capsys):
    texts = ["<observation>o</observation><think>t", None]
    with serving(lambda n, request: Fault(body=completion(texts[n], "length"))) as server:
        cot(http_settings(toy, tmp_path, server, limit=2, concurrency=1))
    assert [row["reason"] for row in lines(tmp_path / "dropped.jsonl")] == ["template broken", "not generated"]
    assert "1 records are unfinished (most often: cut off at the token limit" in capsys.readouterr().out
    assert [row["output"] for row in lines(tmp_path / "1-generated.0.jsonl")] == texts[:1]


# ------------------------------------------------------------------------------------------------ it survives

def test_an_outage_ends_the_run_and_nothing_is_asked_twice(toy, well, tmp_path):
    with serving(lambda n, request: well(n, request) if n < 9 else Fault(503, body=b"down")) as server:
        with pytest.raises(ValueError, match="20 of 40 failed, the last for HTTP 503.*The rest is kept"):
            cot(http_settings(toy, tmp_path, server, concurrency=1))
    assert not (tmp_path / "traces.jsonl").exists()
    with serving(well) as again:                             # the server comes back, at another address
        cot(http_settings(toy, tmp_path, again))
    assert [r["model"] for r in again.requests].count("t") == 31


def test_a_few_failures_are_tried_again_by_the_next_run(toy, well, tmp_path):
    with serving(lambda n, request: Fault(500) if n % 9 == 4 else well(n, request)) as server:
        cot(http_settings(toy, tmp_path, server))
    assert {"not generated", "not judged"} <= {row["reason"] for row in lines(tmp_path / "dropped.jsonl")}
    with serving(well) as server:
        cot(http_settings(toy, tmp_path, server))
        asked = len(server.requests)
        cot(http_settings(toy, tmp_path / "clean", server))
    assert asked < len(server.requests) / 2, "only what failed is asked again"
    assert lines(tmp_path / "traces.jsonl") == lines(tmp_path / "clean/traces.jsonl")


def test_a_judge_that_is_never_understood_stops_the_work(toy, well, tmp_path):
    """And another one may take over, since no verdict has been given yet."""
    with serving(lambda n, request: well(n, request) if request["model"] == "t" else "Hm.") as server:
        with pytest.raises(ValueError, match="20 of .* failed, the last for no verdict at the end of the reply"):
            cot(http_settings(toy, tmp_path, server))
        cot(http_settings(toy, tmp_path, server, judge="rule"))
    assert [r["model"] for r in server.requests].count("t") == 40, "the teacher's work is kept"


def test_kill_it_at_any_moment(toy, well, tmp_path):
    """SIGKILL, then Ctrl-C, while requests are under way. At the end: the same files as without, and no request
    repeated except the two that were under way at each."""
    moments = random.Random(0)
    with serving(well, delay=0.05) as server:
        given = flags(data=toy / "sft.json", teacher=server.url, teacher_model="t", judge=server.url, judge_model="j",
                      concurrency=2, frames=2, max_pixels=784, min_pixels=784, out=tmp_path / "killed")
        words = command("data.py", ["cot", "--no-refuse-leaks", *given])
        for least, stop in ((8, signal.SIGKILL), (45, signal.SIGINT)):
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.requests) < least:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(stop)
            process.wait()
        subprocess.run(words, check=True, timeout=60)
        killed = len(server.requests)
        data.main([*words[2:], "--out", str(tmp_path / "whole")])
        whole = len(server.requests) - killed
    assert killed - whole <= 6                               # one more each may be answered and not yet written
    for name in ("traces.jsonl", "dropped.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_finished_work_is_not_done_again_and_other_settings_are_other_work(toy, tmp_path):
    first = cot(settings(toy, tmp_path)).read_bytes()
    assert cot(settings(toy, tmp_path, mistakes=0.5)).read_bytes() != first
    assert cot(settings(toy, tmp_path)).read_bytes() == first
    assert len(lines(tmp_path / "1-generated.0.jsonl")) == 80


def test_media_that_cannot_be_read_are_a_reason_and_can_be_repaired(toy, well, tmp_path, capsys):
    world = shutil.copytree(toy, tmp_path / "world")
    clip = next(world.glob("sft/*.apng"))
    away = clip.rename(tmp_path / "away")
    with serving(well) as server:
        s = http_settings(world, tmp_path / "out", server, judge="rule")
        cot(s)
        assert "1 records are unfinished (most often: media: no such file)" in capsys.readouterr().out
        assert "not generated" in {row["reason"] for row in lines(tmp_path / "out/dropped.jsonl")}
        away.rename(clip)
        cot(s)
    assert "unfinished" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the command

def test_without_data_it_makes_the_toy_world(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.make_toy, "__defaults__", ({"sft": 12}, 0))
    data.main(["cot", "--out", str(tmp_path / "cot")])
    assert "traces are kept for SFT" in capsys.readouterr().out and (tmp_path / "toy" / "sft.json").is_file()


@pytest.mark.parametrize("given, complaint", [
    (["--teacher", "toy"], "The toy teacher and the rule judge know toy records only"),
    (["--teacher", "https://host/v1", "--teacher-model", "t"], "The toy teacher and the rule judge know toy records"),
    (["--teacher", "nowhere"], "--teacher nowhere: neither toy nor an address"),
    (["--judge", "reference"], "--judge reference needs a model: choose an http address"),
    (["--judge", "reference", "--judge-model", "runs"], "--judge reference needs a model")])
def test_what_cannot_work_is_said_in_a_line(tmp_path, given, complaint):
    record = dict(problem="What is it?", problem_type="free-form", solution="a cat", path="a.png", data_type="image")
    (tmp_path / "mine.json").write_text(json.dumps([record]))
    with pytest.raises(SystemExit, match=complaint):
        data.main(["cot", "--data", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), *given])
