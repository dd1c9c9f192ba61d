"""Promise: a server that is slow, busy, broken or gone costs time, never a wrong answer; and a key goes to the server
it is for and nowhere else."""
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

import pagrpo
import sft
from data import JudgeSettings, make_judge
from rewards import CUT_OFF, Claim, ChatClient, read_verdict
from serving import Fault, completion, serving, text_of

KEY = "sk-very-secret-1234567890"


def chat(text):
    return [{"role": "user", "content": text}]


def client_of(server, key="", timeout=60.0, retries=24, **body):
    return ChatClient(getattr(server, "url", server), key, timeout, retries, {"model": "m"} | body)


def judge_of(server, place=None, **settings):
    """The judge behind a server, as the flags make it."""
    return make_judge(JudgeSettings(judge=server.url, judge_model=settings.pop("model", "m"), refuse_leaks=False, **settings),
                      place)


def claim(text):
    return Claim("What is it?", (), "free-form", "a cat", text)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the package would have slept between its tries; it does not sleep."""
    slept, here = [], threading.get_ident()

    def sleep(seconds):
        if threading.get_ident() == here:                    # a client of an earlier test may still be trying
            slept.append(seconds)
    monkeypatch.setattr(openai._base_client.time, "sleep", sleep)
    return slept


# ------------------------------------------------------------------------------------------------ what is sent

@pytest.mark.parametrize("key", [KEY, ""])
def test_a_server_gets_its_own_key_and_nothing_else_from_the_environment(key, monkeypatch):
    """Keys and headers for OpenAI's own servers are in OPENAI_…: none of them is for this one."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv("OPENAI_" + name, "users-own")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://users-own/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer users-own\nX-Team: users-own")
    with serving(lambda n, request: "hello") as server:
        assert client_of(server, key, temperature=0, max_tokens=7).ask(chat("hi")).text == "hello"
    assert server.requests == [{"path": "/v1/chat/completions", "model": "m", "temperature": 0, "max_tokens": 7,
                                "messages": chat("hi")}]
    assert server.headers[0].get("Authorization") == (f"Bearer {KEY}" if key else None)
    assert "users-own" not in str(server.headers[0]) and "stainless" not in str(server.headers[0]).lower()


def test_a_redirect_is_not_followed():
    """The key was meant for this server."""
    with serving(lambda n, request: "stolen") as thief:
        with serving(lambda n, request: Fault(307, {"Location": thief.url + "/chat/completions"})) as server:
            reply = client_of(server, KEY).ask(chat("?"))
    assert reply.text is None and "HTTP 307" in reply.error and not thief.requests and len(server.requests) == 1


def test_a_refused_key_is_reported_once_and_shown_nowhere_even_if_the_server_repeats_it(capfd):
    body = b" " * 190 + json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    with serving(lambda n, request: Fault(401, body=body)) as server:
        client = client_of(server, KEY)
        refused = client.ask(chat("a"))
    printed = capfd.readouterr()
    assert "HTTP 401" in refused.error and "Incorrect API key" in refused.error and len(server.requests) == 1
    assert KEY[:9] not in refused.error + printed.out + printed.err + str(client)


@pytest.mark.parametrize("url", ["https://user:secret@host/v1", "https://:secret@host/v1", "https:///v1",
                                 "https://host/v1?key=secret", "https://host/v1#secret"])
def test_an_address_that_holds_a_key_or_no_host_is_refused(url):
    with pytest.raises(SystemExit, match="--judge: an address is like https://host:port/v1") as refused:
        pagrpo.Settings(judge=url, judge_model="m")
    assert "secret" not in str(refused.value)


def test_the_package_is_needed_for_servers_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert pagrpo.Settings(judge="rule")
    with pytest.raises(SystemExit, match="pip install openai"):
        pagrpo.Settings(judge="http://host/v1", judge_model="m")


# ------------------------------------------------------------------------------------------------ many at once

def test_verdicts_are_in_the_order_of_the_claims_and_no_more_are_asked_at_once_than_allowed():
    def slower_for_the_first(number, request):
        seen = int(text_of(request).split("item ")[1].split('"')[0])
        threading.Event().wait(0.12 - 0.01 * seen)
        return f"item {seen} <judgement>Yes</judgement>"
    with serving(slower_for_the_first) as server:
        verdicts = judge_of(server, concurrency=4)([claim(f"item {i}") for i in range(12)])
    assert [v.explanation.split(" <")[0] for v in verdicts] == [f"item {i}" for i in range(12)]
    assert server.most_under_way == 4


def test_a_program_that_ends_does_not_wait_for_a_slow_server():
    program = """if True:
        import sys, time
        from multiprocessing.pool import ThreadPool
        from data import JudgeSettings, make_judge
        from rewards import Claim
        judge = make_judge(JudgeSettings(judge=sys.argv[1], judge_model="m"))
        claim = Claim("What is it?", (), "free-form", "a cat", "there is a small grey animal on a mat")
        ThreadPool(1).apply_async(judge, ([claim],))
        time.sleep(3)
    """
    with serving(lambda n, request: "late", delay=60) as server:
        ended = subprocess.run([sys.executable, "-c", program, server.url], cwd=Path(__file__).parents[1],
                               capture_output=True, text=True, timeout=50)
    assert ended.returncode == 0 and not ended.stderr and server.requests, ended.stderr


# ------------------------------------------------------------------------------------------------ faults

def test_what_may_pass_is_tried_again_and_a_server_that_asks_for_time_gets_it(waits):
    faults = [Fault(500), Fault(503, body=b"overloaded"), Fault(408), Fault(drop=True),
              Fault(429, {"Retry-After": "40"}), Fault(headers={"Content-Length": "900"}, body=b'{"choices"')]
    with serving(lambda n, request: faults[n] if n < 6 else "at last") as server:
        assert client_of(server, timeout=1.0, retries=6).ask(chat("?")).text == "at last"
    assert len(server.requests) == 7 and waits[4] == 40


def test_an_outage_of_two_minutes_is_survived(waits, monkeypatch):
    """With the default of --retries, whatever the random part of the waits; and all tries end before other ranks give up."""
    with serving(lambda n, request: "back" if sum(waits) > 120 else Fault(503, body=b"down")) as server:
        monkeypatch.setattr(openai._base_client, "random", lambda: 1.0)      # waits are as short as they can be
        settings = JudgeSettings()
        client = client_of(server, retries=settings.retries)
        assert client.ask(chat("?")).text == "back"
        waits[:] = [-1000]                                                   # now it does not come back
        monkeypatch.setattr(openai._base_client, "random", lambda: 0.0)      # as long as they can be
        assert client.ask(chat("?")).error == "HTTP 503 down"
        assert sum(waits[1:]) + (settings.retries + 1) * settings.timeout < sft.TIMEOUT.total_seconds()


def test_slow_answers_are_waited_for_and_too_slow_ones_asked_for_again(waits):
    with serving(lambda n, request: threading.Event().wait(0.1 if n else 5) or "slow") as server:
        began = time.monotonic()
        assert client_of(server, timeout=0.3, retries=1).ask(chat("?")).text == "slow"
    assert len(server.requests) == 2 and time.monotonic() - began < 4


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/html"}], ids=["json", "html"])
def test_what_is_no_completion_is_an_unknown_verdict(headers):
    bodies = [b"{half", b'{"choices": []}', b'{"error": "no"}', b"[1]", b"\xff\xfe", b"",
              b'{"choices": [{"message": {"content": null}}]}']
    with serving(lambda n, request: Fault(body=bodies[n], headers=headers)) as server:
        client = client_of(server)
        for body in bodies:
            verdict = read_verdict(client.ask(chat("?")))
            assert verdict.sufficient is None and verdict.error.startswith("no chat completion ("), body


def test_what_cannot_pass_is_not_tried_again(waits):
    for status in (400, 403, 404, 422):
        with serving(lambda n, request: Fault(status, body=b"model not found")) as server:
            assert client_of(server).ask(chat("?")) == (None, f"HTTP {status} model not found")
        assert len(server.requests) == 1
    refused = client_of(server, retries=2).ask(chat("?"))          # the server is gone
    assert refused.text is None and "Connection refused" in refused.error and len(waits) == 2


@pytest.mark.parametrize("text", [None, "", "<think>I could say No", "It says <judgement>No</judgement>"])
def test_a_reply_that_was_cut_off_is_no_verdict_and_is_not_kept(text, tmp_path):
    with serving(lambda n, request: Fault(body=completion(text, "length"))) as server:
        reply = client_of(server, max_tokens=9).ask(chat("?"))
        verdict, = judge_of(server, tmp_path / "judge")([claim("a cat on a mat")])
    assert reply == (text or "", CUT_OFF) and "--judge-tokens" in CUT_OFF and "--max-response" in CUT_OFF
    assert (verdict.sufficient, verdict.error) == (None, CUT_OFF) and not list(tmp_path.iterdir())


def test_a_reply_without_text_says_why_there_is_none():
    with serving(lambda n, request: Fault(body=completion(None, "content_filter"))) as server:
        error = client_of(server).ask(chat("?")).error
    assert error.startswith("no chat completion (") and "content_filter" in error and "NoneType" not in error


# ------------------------------------------------------------------------------------------------ refused fields

def refusing(*names: str):
    """A server that answers 400 to these fields, one at a time, as OpenAI's newer models do."""
    def play(number, request):
        for name in names:
            if name in request:
                error = {"message": f"Unsupported parameter: '{name}' is not supported.", "param": name}
                return Fault(400, body=json.dumps({"error": error}).encode())
        return "<judgement>Yes</judgement>"
    return play


@pytest.mark.parametrize("names, sent", [
    (["max_tokens"], {"max_completion_tokens": 7, "temperature": 0, "seed": 1}),
    (["temperature"], {"max_tokens": 7, "seed": 1}),
    (["seed"], {"max_tokens": 7, "temperature": 0}),
    (["seed", "max_tokens", "temperature"], {"max_completion_tokens": 7})])
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(names, sent):
    with serving(refusing(*names)) as server:
        client = client_of(server, temperature=0, max_tokens=7, seed=1)
        verdicts = [read_verdict(client.ask(chat(text))).sufficient for text in "ab"]
    assert verdicts == [True, True] and len(server.requests) == len(names) + 2
    for request in server.requests[-2:]:
        assert {key: request[key] for key in request if key not in ("messages", "model", "path")} == sent


def test_a_request_that_is_refused_with_and_without_a_field_changes_nothing_for_the_next():
    """A prompt that is too long: the complaint names max_tokens as well."""
    def play(number, request):
        long = Fault(400, body=b"8191 tokens in messages, 7 in max_tokens: over 8192")
        return long if text_of(request) == "long" else "fine"
    with serving(play) as server:
        client = client_of(server, max_tokens=7)
        assert [client.ask(chat(text)).text for text in ("long", "short")] == [None, "fine"]
    assert server.requests[-1]["max_tokens"] == 7 and len(server.requests) == 3


# ------------------------------------------------------------------------------------------------ the journal

def test_an_equal_claim_is_asked_once_also_by_the_next_run_and_by_the_other_ranks(tmp_path):
    with serving(lambda n, request: f"reply {n} <judgement>Yes</judgement>") as server:
        def ask(texts, rank=0, **settings):
            settings = JudgeSettings(judge=server.url, judge_model="m", refuse_leaks=False, **settings)
            verdicts = make_judge(settings, tmp_path / "judge", rank=rank)([claim(f"item {x}") for x in texts])
            return [int(v.explanation.split()[1]) for v in verdicts]
        assert sorted(ask("aba")) == sorted([0, 1, 0]) or sorted(ask("aba")) == sorted([1, 0, 1])
        first = ask("b")
        assert ask("b", rank=1) == first and len(server.requests) == 2
        assert ask("b", judge_tokens=7) == [2], "other settings are another key"
        file = tmp_path / "judge.0.jsonl"
        file.write_bytes(file.read_bytes()[:-9])             # cut short by a kill: its last line alone is lost
        assert ask("b", judge_tokens=7) == [3] and ask("b") == first
    assert len(file.read_text().splitlines()) == 3


def test_only_a_verdict_is_kept(tmp_path, waits):
    said = [Fault(500), "Hm.", "<judgement>Yes</judgement>", "never asked for"]
    with serving(lambda n, request: said[n]) as server:
        verdicts = [judge_of(server, tmp_path / "judge", retries=0)([claim("a cat")])[0] for _ in range(4)]
    assert [v.sufficient for v in verdicts] == [None, None, True, True] and len(server.requests) == 3


def test_a_reply_can_be_written_down_and_shown():
    """Lone surrogates and control characters, which break a file or a terminal, come from servers as well."""
    broken = json.dumps({"choices": [{"message": {"content": "a\ud800b \x1b[2J\x00 <judgement>Yes</judgement>"}}]})
    with serving(lambda n, request: Fault(body=broken.encode())) as server:
        reply = client_of(server).ask(chat("?"))
    verdict = read_verdict(reply)
    assert reply.text.encode() and verdict.sufficient and verdict.explanation == "a?b [2J <judgement>Yes</judgement>"
