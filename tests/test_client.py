"""Promise: a server that is slow, busy, broken or gone costs time, never a wrong answer; and a key
goes to the server it is for and nowhere else."""
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

import data
from rewards import CUT_OFF, ChatClient, read_verdict
from serving import Fault, completion, serving, text_of

KEY = "sk-very-secret-1234567890"
YES = "<judgement>Yes</judgement>"


def chat(text):
    return [{"role": "user", "content": text}]


def client(url, key="", timeout=5.0, retries=0, **body):
    return ChatClient(url, key, timeout, retries, {"model": "m"} | body)


def ask(play, *texts, **options):
    """The replies to texts of a client whose server answers so, and the server."""
    with serving(play) as server:
        asked = client(server.url, **options)
        return [asked.ask(chat(text)) for text in texts or "?"], server


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the package would have slept between its tries; it does not sleep."""
    slept, here = [], threading.get_ident()

    def sleep(seconds):
        if threading.get_ident() == here:                    # an earlier client may still be trying
            slept.append(seconds)
    monkeypatch.setattr(openai._base_client.time, "sleep", sleep)
    return slept


# ------------------------------------------------------------------------------------ what is sent

@pytest.mark.parametrize("key", [KEY, ""])
def test_a_server_gets_its_own_key_and_nothing_else_from_the_environment(key, monkeypatch):
    """Keys and headers for OpenAI's own servers are in OPENAI_…: none of them is for this one."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv("OPENAI_" + name, "users-own")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://users-own/v1")
    custom = "Authorization: Bearer users-own\nX-Team: users-own"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
    _, server = ask(lambda n, request: "hello", "hi", key=key, temperature=0)
    assert server.requests == [{"path": "/v1/chat/completions", "model": "m", "temperature": 0,
                                "messages": chat("hi")}]
    assert server.headers[0].get("Authorization") == (f"Bearer {KEY}" if key else None)
    sent = str(server.headers[0]).lower()
    assert "users-own" not in sent and "stainless" not in sent


def test_a_redirect_is_not_followed():
    """The key was meant for this server."""
    with serving(lambda n, request: "stolen") as thief:
        there = {"Location": thief.url + "/chat/completions"}
        (reply,), server = ask(lambda n, request: Fault(307, there), key=KEY)
    assert reply.text is None and "HTTP 307" in reply.error
    assert not thief.requests and len(server.requests) == 1


def test_a_refused_key_is_shown_nowhere_even_if_the_server_repeats_it(capfd):
    message = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    body = b" " * 190 + json.dumps(message).encode()
    (refused,), server = ask(lambda n, request: Fault(401, body=body), key=KEY, retries=2)
    assert "HTTP 401" in refused.error and "Incorrect API key" in refused.error
    assert len(server.requests) == 1 and KEY[:9] not in refused.error + "".join(capfd.readouterr())


def test_a_broken_key_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret\nX-Evil: 1")
    with pytest.raises(ValueError, match="JUDGE_API_KEY") as refused:
        data.make_judge(data.JudgeSettings(judge="http://host/v1", judge_model="m"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url, complaint", [
    *((url, "an address is like https://host:port/v1; keys come from the environment") for url in (
        "https://user:secret@host/v1", "https://:secret@host/v1", "https:///v1",
        "https://host/v1?key=secret", "https://host/v1#secret")),
    ("claude", "--judge claude: neither rule, reference nor an address; a model in a folder can be"),
    ("http://host/v1", "--judge http://host/v1 needs --judge-model, and `pip install openai`")])
def test_what_is_no_server_is_refused_without_showing_a_key(url, complaint):
    with pytest.raises(SystemExit) as refused:
        data.CotSettings(judge=url, judge_model="" if url == "http://host/v1" else "m")
    assert complaint in str(refused.value) and "secret" not in str(refused.value)


def test_the_package_is_needed_for_servers_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert data.CotSettings(judge="rule")
    with pytest.raises(SystemExit, match="pip install openai"):
        data.CotSettings(judge="http://host/v1", judge_model="m")


# ------------------------------------------------------------------------------------------ faults

def test_what_may_pass_is_tried_again_and_a_server_that_asks_for_time_gets_it(waits):
    faults = [Fault(500), Fault(503, body=b"overloaded"), Fault(408), Fault(drop=True),
              Fault(429, {"Retry-After": "40"}),
              Fault(headers={"Content-Length": "900"}, body=b'{"choices"')]
    (reply,), server = ask(lambda n, request: [*faults, "at last"][n], timeout=1.0, retries=6)
    assert reply.text == "at last" and len(server.requests) == 7 and waits[4] == 40


def test_an_outage_of_two_minutes_is_survived(waits, monkeypatch):
    """With the default of --retries, even if the random part of each wait makes it short."""
    monkeypatch.setattr(openai._base_client, "random", lambda: 1.0)

    def play(number, request):
        return "back" if sum(waits) > 120 else Fault(503, body=b"down")
    (reply,), _ = ask(play, retries=data.JudgeSettings().retries)
    assert reply.text == "back"


def test_a_server_that_hangs_is_given_up_before_other_ranks_give_up_waiting(waits, monkeypatch):
    import sft
    monkeypatch.setattr(openai._base_client, "random", lambda: 0.0)          # the longest waits
    s = data.JudgeSettings()
    (reply,), server = ask(lambda n, request: threading.Event().wait(1) or "late", timeout=0.01,
                           retries=s.retries)
    assert reply.text is None and len(server.requests) == s.retries + 1
    assert len(server.requests) * s.timeout + sum(waits) < sft.TIMEOUT.total_seconds()


def test_slow_answers_are_waited_for_and_too_slow_ones_asked_for_again(waits):
    began = time.monotonic()
    (reply,), server = ask(lambda n, request: threading.Event().wait(0.1 if n else 5) or "slow",
                           timeout=0.3, retries=1)
    assert reply.text == "slow" and len(server.requests) == 2 and time.monotonic() - began < 4


def test_a_program_that_ends_does_not_wait_for_a_slow_server():
    program = """if True:
        import sys
        from functools import partial
        from multiprocessing.pool import ThreadPool
        from rewards import ChatClient, Claim, Journal, journaled, judge_by_chat
        decide = partial(judge_by_chat, ChatClient(sys.argv[1], "", 60, 24, {"model": "m"}).ask)
        claim = Claim("What is it?", (), "free-form", "a cat", "a small grey animal")
        pool = ThreadPool(1)
        pool.apply_async(journaled, (decide, [], Journal(None), [claim]))
        sys.stdin.readline()
    """
    with serving(lambda n, request: "late", delay=60) as server:
        started = subprocess.Popen([sys.executable, "-c", program, server.url], text=True,
                                   cwd=Path(__file__).parents[1], stdin=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        while not server.requests and started.poll() is None:
            time.sleep(0.01)
        _, said = started.communicate("\n", timeout=30)
    assert started.returncode == 0 and server.requests, said


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_what_is_no_completion_is_an_unknown_verdict(kind):
    bodies = [b"{half", b'{"choices": []}', b'{"error": "no"}', b"[1]", b"\xff\xfe", b"",
              b'{"choices": [{"message": {"content": null}}]}', completion(None, "content_filter")]
    replies, _ = ask(lambda n, request: Fault(body=bodies[n], headers={"Content-Type": kind}),
                     *map(str, bodies))
    for verdict in map(read_verdict, replies):
        assert verdict.sufficient is None and verdict.error.startswith("no chat completion (")
    assert kind == "text/html" or "content_filter" in replies[-1].error, "why there is no text"


def test_what_cannot_pass_is_not_tried_again(waits):
    for status in (400, 403, 404, 422):
        replies, server = ask(lambda n, request: Fault(status, body=b"no such model"), retries=2)
        assert replies == [(None, f"HTTP {status} no such model")] and len(server.requests) == 1
    gone = client(server.url, retries=2).ask(chat("?"))
    assert gone.text is None and "Connection refused" in gone.error and len(waits) == 2


@pytest.mark.parametrize("text", [None, "", "<think>I could say No", f"It says {YES}"])
def test_a_reply_that_was_cut_off_is_no_verdict(text):
    replies, _ = ask(lambda n, request: Fault(body=completion(text, "length")))
    assert replies == [(text or "", CUT_OFF)] and read_verdict(replies[0]).sufficient is None
    assert "--judge-tokens" in CUT_OFF and "--max-response" in CUT_OFF


def test_a_reply_can_be_written_down_and_shown():
    """Lone surrogates and control characters, which break a file or a terminal, come from servers
    as well."""
    broken = json.dumps({"choices": [{"message": {"content": f"a\ud800b \x1b[2J\x00 {YES}"}}]})
    (reply,), _ = ask(lambda n, request: Fault(body=broken.encode()))
    verdict = read_verdict(reply)
    assert reply.text.encode() and verdict.sufficient and verdict.explanation == f"a?b [2J {YES}"


# ---------------------------------------------------------------------------------- refused fields

@pytest.mark.parametrize("names, sent", [
    (["max_tokens"], {"max_completion_tokens": 7, "temperature": 0, "seed": 1}),
    (["temperature"], {"max_tokens": 7, "seed": 1}),
    (["seed"], {"max_tokens": 7, "temperature": 0}),
    (["seed", "max_tokens", "temperature"], {"max_completion_tokens": 7})])
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(names, sent):
    """A server that refuses them one at a time, as OpenAI's newer models do."""
    def play(number, request):
        for name in names:
            if name in request:
                message = f"Unsupported parameter: '{name}' is not supported."
                error = {"error": {"message": message, "param": name}}
                return Fault(400, body=json.dumps(error).encode())
        return "fine"
    replies, server = ask(play, *"ab", temperature=0, max_tokens=7, seed=1)
    assert replies == [("fine", "")] * 2 and len(server.requests) == len(names) + 2
    for request in server.requests[-2:]:
        fields = request.keys() - {"messages", "model", "path"}
        assert {name: request[name] for name in fields} == sent


def test_a_request_that_is_refused_with_and_without_a_field_changes_nothing_for_the_next():
    """A prompt that is too long: the complaint names max_tokens as well."""
    long = Fault(400, body=b"8191 tokens in messages, 7 in max_tokens: over 8192")
    replies, server = ask(lambda n, request: long if text_of(request) == "long" else "fine",
                          "long", "short", max_tokens=7)
    assert [reply.text for reply in replies] == [None, "fine"]
    assert server.requests[-1]["max_tokens"] == 7 and len(server.requests) == 3
