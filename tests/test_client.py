"""Promise: a server that is slow, busy, broken or gone costs time, never a wrong answer; and a key
goes to the server it is for and is shown nowhere."""
import threading

import openai
import pytest

import data
import sft
from rewards import CUT_OFF, ChatClient, read_verdict
from serving import Fault, completion, serving, text_of

KEY = "sk-very-secret-1234567890"
YES = "<judgement>Yes</judgement>"


def chat(text):
    return [{"role": "user", "content": text}]


def ask(play, *texts, key="", timeout=5.0, retries=0, **body):
    """The replies to texts of a client whose server answers so, and the server."""
    with serving(play) as server:
        client = ChatClient(server.url, key, timeout, retries, {"model": "m"} | body)
        return [client.ask(chat(text)) for text in texts or "?"], server


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the package would have slept between its tries; it does not sleep."""
    slept = []
    monkeypatch.setattr(openai._base_client.time, "sleep", slept.append)
    return slept


# ------------------------------------------------------------------------------------ what is sent

def test_a_server_gets_its_own_key_and_not_that_of_openai(monkeypatch):
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):
        monkeypatch.setenv("OPENAI_" + name, "http://users-own")
    _, server = ask(lambda n, request: "hello", "hi", key=KEY, temperature=0)
    assert server.requests == [{"path": "/v1/chat/completions", "model": "m", "temperature": 0,
                                "messages": chat("hi")}]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "users-own" not in str(server.headers)


def test_a_refused_key_is_shown_nowhere_even_if_the_server_repeats_it(capfd):
    body = b" " * 190 + f"Incorrect API key provided: {KEY}".encode()
    (refused,), server = ask(lambda n, request: Fault(401, body=body), key=KEY, retries=2)
    assert "HTTP 401" in refused.error and "Incorrect API key" in refused.error
    assert len(server.requests) == 1 and KEY[:9] not in refused.error + "".join(capfd.readouterr())


def test_a_broken_key_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret\nX-Evil: 1")
    with pytest.raises(ValueError, match="JUDGE_API_KEY") as refused:
        data.make_judge(data.JudgeSettings(judge="http://host/v1", judge_model="m"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url, complaint", [
    ("https://user:secret@host/v1", "keys come from the environment"),
    ("https://host/v1?key=secret", "keys come from the environment"),
    ("claude", "--judge claude: neither rule, reference nor an address")])
def test_what_is_no_server_is_refused_without_showing_a_key(url, complaint):
    with pytest.raises(SystemExit) as refused:
        data.CotSettings(judge=url, judge_model="m")
    assert complaint in str(refused.value) and "secret" not in str(refused.value)


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
    monkeypatch.setattr(openai._base_client, "random", lambda: 0.0)          # the longest waits
    s = data.JudgeSettings()
    (reply,), _ = ask(lambda n, request: threading.Event().wait(1) or "late", timeout=0.01,
                      retries=s.retries)
    assert reply.text is None and len(waits) == s.retries
    assert (s.retries + 1) * s.timeout + sum(waits) < sft.TIMEOUT.total_seconds()


@pytest.mark.parametrize("body", [
    b"{half", b'{"choices": []}', b'{"error": "no"}', b"\xff\xfe",
    b'{"choices": [{"message": {"content": null}}]}', completion(None, "content_filter")])
def test_what_is_no_completion_is_an_unknown_verdict(body):
    replies, _ = ask(lambda n, request: Fault(body=body))
    verdict = read_verdict(*replies)
    assert verdict.sufficient is None and verdict.error.startswith("no chat completion (")


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(status):
    replies, server = ask(lambda n, request: Fault(status, body=b"no such model"), retries=2)
    assert replies == [(None, f"HTTP {status} no such model")] and len(server.requests) == 1


@pytest.mark.parametrize("text", [None, f"It says {YES}"])
def test_a_reply_that_was_cut_off_is_no_verdict(text):
    replies, _ = ask(lambda n, request: Fault(body=completion(text, "length")))
    assert replies == [(text or "", CUT_OFF)] and read_verdict(*replies).sufficient is None


def test_a_reply_can_be_written_down_and_shown():
    """Lone surrogates and control characters, which break a file or a terminal, come from servers
    as well."""
    broken = completion(f"a\ud800b \x1b[2J\x00 {YES}")
    (reply,), _ = ask(lambda n, request: Fault(body=broken))
    assert reply.text.encode() and read_verdict(reply) == (True, f"a?b [2J {YES}", "", False)


# ---------------------------------------------------------------------------------- refused fields

@pytest.mark.parametrize("names, sent", [
    (["temperature"], {"max_tokens": 7, "seed": 1}),
    (["seed", "max_tokens", "temperature"], {"max_completion_tokens": 7})])
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(names, sent):
    """A server that refuses them one at a time, as OpenAI's newer models do."""
    def play(number, request):
        for name in names:
            if name in request:
                return Fault(400, body=f"Unsupported parameter: '{name}' is not supported.".encode())
        return "fine"
    replies, server = ask(play, "a", "b", temperature=0, max_tokens=7, seed=1)
    assert replies == [("fine", "")] * 2 and len(server.requests) == len(names) + 2
    for request in server.requests[-2:]:
        assert request.items() >= sent.items() and not request.keys() & set(names)


def test_a_request_that_is_refused_with_and_without_a_field_changes_nothing_for_the_next():
    """A prompt that is too long: the complaint names max_tokens as well."""
    long = Fault(400, body=b"8191 tokens in messages, 7 in max_tokens: over 8192")
    replies, server = ask(lambda n, request: long if text_of(request) == "long" else "fine",
                          "long", "short", max_tokens=7)
    assert [reply.text for reply in replies] == [None, "fine"]
    assert server.requests[-1]["max_tokens"] == 7 and len(server.requests) == 3
