"""Promise: a server that is slow, busy, broken or gone costs time, never a wrong answer; and a key goes to the server
it is for and nowhere else."""
import json
import threading
import time
from email.utils import formatdate

import pytest

import rewards
from rewards import Client
from serving import Fault, serving, text_of

KEY = "sk-very-secret-1234567890"


def chat(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def waits(monkeypatch):
    """Seconds that a client would have slept; it does not sleep."""
    slept = []
    monkeypatch.setattr(rewards.time, "sleep", slept.append)
    return slept


def test_a_request_is_what_the_protocol_says():
    with serving(lambda n, request: "hello") as server:
        client = Client(server.url + "/", "judge-1", KEY, body=dict(temperature=0, max_tokens=7))
        assert client.ask(chat("hi")).text == "hello"
    assert server.requests == [{"path": "/v1/chat/completions", "model": "judge-1", "temperature": 0, "max_tokens": 7,
                                "messages": chat("hi")}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_without_a_key_none_is_sent():
    with serving(lambda n, request: "hello") as server:
        Client(server.url, "m").ask(chat("hi"))
    assert "Authorization" not in server.headers[0]


def test_replies_stand_in_the_order_of_the_questions_whatever_arrives_first():
    def slower_for_the_first(number, request):
        threading.Event().wait(0.3 - 0.03 * int(text_of(request)))
        return "re " + text_of(request)
    with serving(slower_for_the_first) as server:
        replies = Client(server.url, "m", concurrency=10).ask_all([chat(str(i)) for i in range(10)])
    assert [r.text for r in replies] == [f"re {i}" for i in range(10)]


def test_requests_go_out_together_but_not_more_than_allowed():
    with serving(lambda n, request: "x", delay=0.1) as server:
        began = time.monotonic()
        Client(server.url, "m", concurrency=4).ask_all([chat(str(i)) for i in range(12)])
    assert server.most_under_way == 4 and time.monotonic() - began < 12 * 0.1


@pytest.mark.parametrize("fault", [
    Fault(500), Fault(503, body=b"overloaded"), Fault(429), Fault(408), Fault(drop=True), Fault(body=b"{half"),
    Fault(body=b'{"choices": []}'), Fault(body=b'{"error": "no"}'), Fault(body=b"[1]"), Fault(body=b"\xff\xfe"),
    Fault(body=b'{"choices": [{"message": {"content": null}}]}'),
    Fault(headers={"Content-Length": "900"}, body=b'{"choices"')], ids=lambda f: f"{f.status} {f.body[:12]} {f.drop}")
def test_what_may_pass_is_tried_again(fault, waits):
    with serving(lambda n, request: fault if n < 2 else "at last") as server:
        client = Client(server.url, "m", timeout=1.0, retries=3)
        assert client.ask(chat("?")).text == "at last"
    assert client.counts == {"requests": 1, "retries": 2} and len(server.requests) == 3


def test_waits_grow_and_are_never_the_same(waits):
    with serving(lambda n, request: Fault(500)) as server:
        reply = Client(server.url, "m", retries=4).ask(chat("?"))
    assert reply.text is None and "HTTP 500" in reply.error
    assert len(waits) == 4 and all(0.5 * 2 ** i <= w <= 1.5 * 2 ** i for i, w in enumerate(waits)), waits
    assert len({w / 2 ** i for i, w in enumerate(waits)}) == 4, "with jitter"


def test_a_server_that_asks_for_time_gets_it():
    with serving(lambda n, request: Fault(429, {"Retry-After": "0.7"}) if n == 0 else "ok") as server:
        assert Client(server.url, "m").ask(chat("?")).text == "ok"
    assert 0.7 <= server.times[1] - server.times[0] < 2


def test_it_may_name_a_date_instead(waits):
    date = formatdate(time.time() + 40, usegmt=True)
    with serving(lambda n, request: Fault(503, {"Retry-After": date}) if n == 0 else "ok") as server:
        assert Client(server.url, "m").ask(chat("?")).text == "ok"
    assert waits and all(37 < seconds < 42 for seconds in waits)


def test_all_other_requests_wait_with_it():
    with serving(lambda n, request: Fault(429, {"Retry-After": "0.6"}) if n == 0 else "ok") as server:
        client = Client(server.url, "m")
        first = threading.Thread(target=client.ask, args=(chat("a"),))
        first.start()
        while not client.pause_until:
            time.sleep(0.01)
        assert client.ask(chat("b")).text == "ok"
        first.join()
    assert server.times[1] - server.times[0] >= 0.6


def test_a_header_nobody_can_read_is_no_reason_to_stop(waits):
    with serving(lambda n, request: Fault(429, {"Retry-After": "soon"}) if n == 0 else "ok") as server:
        assert Client(server.url, "m").ask(chat("?")).text == "ok"


def test_an_hour_is_too_long(waits):
    with serving(lambda n, request: Fault(429, {"Retry-After": "3600"})) as server:
        assert Client(server.url, "m").ask(chat("?")).text is None
    assert len(server.requests) == 1 and not waits


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_pass_is_not_tried_again(status, waits):
    with serving(lambda n, request: Fault(status, body=b"model not found")) as server:
        reply = Client(server.url, "m").ask(chat("?"))
    assert reply.text is None and reply.error == f"HTTP {status} model not found" and len(server.requests) == 1


def test_a_batch_has_a_time_of_its_own(monkeypatch):
    """Ranks that wait for each other give up after ten minutes: before that, a hopeless server must be given up."""
    monkeypatch.setattr(rewards, "PATIENCE", 0.4)
    with serving(lambda n, request: Fault(500)) as server:
        began = time.monotonic()
        replies = Client(server.url, "m", retries=50, concurrency=2).ask_all([chat(str(i)) for i in range(6)])
    assert all(r.text is None for r in replies) and time.monotonic() - began < 2


def test_a_server_that_always_asks_for_a_second_gets_longer_ones(waits):
    with serving(lambda n, request: Fault(429, {"Retry-After": "1"})) as server:
        Client(server.url, "m", retries=5).ask(chat("?"))
    assert len(server.requests) == 6 and max(waits) > 8


def test_slow_answers_are_waited_for_and_too_slow_ones_given_up():
    with serving(lambda n, request: threading.Event().wait(5 if n == 0 else 0.3) or "slow") as server:
        client = Client(server.url, "m", timeout=0.5, retries=1)
        began = time.monotonic()
        assert client.ask(chat("?")).text == "slow" and time.monotonic() - began < 4


def test_a_reply_in_drops_ends_at_the_timeout():
    with serving(lambda n, request: Fault(body=b'{"choices": [' + b" " * 500, drip=0.05)) as server:
        began = time.monotonic()
        reply = Client(server.url, "m", timeout=0.5, retries=0).ask(chat("?"))
    assert reply.text is None and "no whole reply in 0.5 s" in reply.error and time.monotonic() - began < 2


def test_headers_in_drops_end_as_well():
    import socket
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def drip():
            connection, _ = listening.accept()
            connection.recv(65536)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(100):
                    connection.sendall(b"x")
                    threading.Event().wait(0.1)
            except OSError:
                pass
        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        reply = Client(url, "m", timeout=0.5, retries=0).ask(chat("?"))
    assert reply.text is None and "no whole reply in 0.5 s" in reply.error and time.monotonic() - began < 3


def test_nobody_there(waits):
    with serving(lambda n, request: "x") as server:
        pass
    reply = Client(server.url, "m", retries=2).ask(chat("?"))
    assert reply.text is None and "Connection refused" in reply.error and len(waits) == 2


def test_a_redirect_is_not_followed(waits):
    """The key was meant for this server."""
    with serving(lambda n, request: "stolen") as thief:
        with serving(lambda n, request: Fault(302, {"Location": thief.url + "/chat/completions"})) as server:
            reply = Client(server.url, "m", KEY).ask(chat("?"))
    assert reply.text is None and "HTTP 302" in reply.error and not thief.requests


def test_an_equal_request_is_asked_once_also_by_the_next_run(tmp_path):
    file = tmp_path / "cache.jsonl"
    with serving(lambda n, request: f"answer {n}") as server:
        first = Client(server.url, "m", cache=file, body={"temperature": 0})
        assert [first.ask(chat("a")).text, first.ask(chat("b")).text, first.ask(chat("a")).text] == [
            "answer 0", "answer 1", "answer 0"]
        assert first.counts == {"requests": 2, "cached": 1}
        later = Client(server.url, "m", cache=file, body={"temperature": 0})
        assert later.ask(chat("b")).text == "answer 1" and later.counts == {"cached": 1}
        other = Client(server.url, "m", cache=file, body={"temperature": 1})
        assert other.ask(chat("b")).text == "answer 2", "another temperature is another request"
        assert Client(server.url, "n", cache=file, body={"temperature": 0}).ask(chat("b")).text == "answer 3"


def test_a_reply_can_be_written_down_and_shown(tmp_path):
    """Half a character and control characters, which would break a file or a terminal, come from servers as well."""
    broken = json.dumps({"choices": [{"message": {"content": "a\ud800b \x1b[2J\x00 <judgement>Yes</judgement>"}}]})
    with serving(lambda n, request: Fault(body=broken.encode())) as server:
        reply = Client(server.url, "m", cache=tmp_path / "c.jsonl").ask(chat("?"))
    reply.text.encode()
    verdict = rewards.read_verdict(reply)
    assert verdict.sufficient and verdict.explanation == "a?b [2J <judgement>Yes</judgement>"


def test_a_failure_is_not_kept(tmp_path, waits):
    with serving(lambda n, request: Fault(500) if n < 2 else "now") as server:
        client = Client(server.url, "m", cache=tmp_path / "c.jsonl", retries=1)
        assert client.ask(chat("a")).text is None and client.ask(chat("a")).text == "now"


def test_the_key_appears_nowhere(tmp_path, waits, capsys):
    """Not in errors even when the server repeats it, not in the cache, not in what is printed."""
    cache = tmp_path / "cache.jsonl"
    repeat = lambda n, request: (Fault(401, body=b" " * 190 + f"Incorrect API key provided: {KEY}".encode())
                                 if n == 0 else f"fine, {KEY}")
    with serving(repeat) as server:
        client = Client(server.url, "m", KEY, cache=cache)
        refused, fine = client.ask(chat("a")), client.ask(chat("b"))
    printed = capsys.readouterr()
    assert "Incorrect API key" in refused.error and fine.text == "fine, ***"
    assert KEY[:9] not in refused.error + cache.read_text() + printed.out + printed.err + repr(client) + str(client)


@pytest.mark.parametrize("url", ["https://user:secret@host/v1", "https://:secret@host/v1", "https:///v1", "http://",
                                 "https://host/v1?key=secret", "https://host/v1#secret"])
def test_an_address_that_holds_a_key_or_no_host_is_refused(url):
    with pytest.raises(ValueError) as refused:
        Client(url, "m")
    assert "secret" not in str(refused.value)


def test_a_cache_cut_short_by_a_kill_loses_its_last_line_only(tmp_path):
    file = tmp_path / "cache.jsonl"
    with serving(lambda n, request: f"answer {n}") as server:
        client = Client(server.url, "m", cache=file)
        client.ask(chat("a")), client.ask(chat("b"))
        file.write_bytes(file.read_bytes()[:-9])
        again = Client(server.url, "m", cache=file)
        assert again.ask(chat("a")).text == "answer 0" and again.ask(chat("b")).text == "answer 2"
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["answer 0", "answer 2"]
