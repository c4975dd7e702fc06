"""The client of servers with OpenAI's chat API, against a server that the test starts."""

import json
import random
import threading
from itertools import islice

import pytest
from chat_servers import Response, chat_server, completion, fault

from rlhf.core.errors import UserError
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.config import ServerConfig
from rlhf.servers.pace import Pace, backoff, retry_after
from rlhf.servers.replies import ChatRequest, Failure, Reply


def ask(text, number=0, **options):
    return ChatRequest([{"role": "user", "content": text}], options, number)


def said(request):
    return request["messages"][-1]["content"]


def open_server(found, cache=None, waits=None, **config):
    return ChatServer(
        ServerConfig(url=found.url, model="m", **config), cache, (waits if waits is not None else []).append
    )


def ask_one(server, request):
    [result] = server.ask([request])
    return result


def echo(request, _):
    return completion("re: " + said(request))


def test_replies_come_in_the_order_of_the_requests_with_their_tokens():
    with chat_server(echo) as found, open_server(found, price_input=1.0, price_output=2.0) as server:
        replies = list(server.ask(ask(f"word {i}", max_tokens=5) for i in range(40)))
    assert [r.text for r in replies] == [f"re: word {i}" for i in range(40)]
    assert replies[0] == Reply("re: word 0", "stop", 10, 3)
    assert found.asked[0].keys() == {"model", "messages", "max_tokens"} and found.asked[0]["max_tokens"] == 5
    assert (server.usage.requests, server.usage.prompt_tokens, server.usage.completion_tokens) == (40, 400, 120)
    assert server.cost == pytest.approx((400 * 1 + 120 * 2) / 1e6)


def test_at_most_so_many_requests_wait_at_once():
    full = threading.Barrier(3, timeout=20)  # only passes while three requests are under way

    def answer(request, number):
        full.wait()
        return completion("yes")

    with chat_server(answer) as found, open_server(found, concurrency=3) as server:
        assert len(list(server.ask(ask(str(i)) for i in range(12)))) == 12
    assert found.most_at_once == 3


def test_429_and_5xx_and_nonsense_are_sent_again_and_retry_after_is_obeyed():
    responses = [
        fault(429, "slow down", Retry_After="100"),
        fault(503, "overloaded"),
        Response("<html>proxy</html>"),
        Response({"choices": []}),
        completion("done"),
    ]
    waits = []
    with chat_server(lambda _, number: responses[number]) as found, open_server(found, waits=waits) as server:
        assert ask_one(server, ask("hi")).text == "done"
    assert server.usage.retries == 4 and server.usage.requests == 1
    assert waits[0] == 100
    short = [seconds for seconds in waits if seconds < 20]  # the others are the rest of the pause
    assert all(0.75 * limit <= seconds <= limit for seconds, limit in zip(short, (2, 4, 8), strict=True))


def test_a_request_that_fails_each_time_is_a_failure_and_ten_in_a_row_stop():
    with chat_server(lambda *_: fault(500, "broken")) as found:
        with open_server(found, retries=2) as server:
            result = ask_one(server, ask("hi"))
            assert result == Failure("the server failed: status 500", "broken") and len(found.asked) == 3
        with open_server(found, retries=0, concurrency=1) as server, pytest.raises(UserError, match="10 requests in a"):
            list(server.ask(ask(str(i)) for i in range(100)))
    assert len(found.asked) < 60


def test_a_page_instead_of_completions_names_the_address_as_the_fault():
    with (
        chat_server(lambda *_: Response("<html>")) as found,
        open_server(found, retries=0, concurrency=4) as server,
        pytest.raises(UserError, match=r"1\d requests in a row got no answer: .*not a chat completion(.|\n)*base of"),
    ):
        list(server.ask(ask(f"q {i}") for i in range(40)))


def test_a_refused_request_is_a_failure_of_its_own_and_not_sent_again():
    def answer(request, _):
        return fault(400, "maximum context length") if len(said(request)) > 20 else completion("short")

    with chat_server(answer) as found, open_server(found, concurrency=1) as server:
        results = list(server.ask(ask("x" if i == 0 else "long " * 9 + str(i)) for i in range(30)))
    assert results[0].text == "short"
    assert results[1] == Failure("the server refused the request", "status 400: maximum context length")
    assert server.usage.failures == 29 and len(found.asked) == 30


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (fault(401, "no"), "refuses a request without a key"),
        (fault(404, "unknown"), "has no model 'm'"),
        (fault(402, "pay"), "no credit left"),
        (fault(429, "tomorrow", Retry_After="86400"), "asks for a pause of 86,400 seconds"),
    ],
)
def test_what_would_fail_every_time_stops_at_once(response, message):
    with (
        chat_server(lambda *_: response) as found,
        open_server(found, concurrency=1) as server,
        pytest.raises(UserError, match=message),
    ):
        list(server.ask(ask(str(i)) for i in range(20)))
    assert len(found.asked) == 1


def test_an_absent_server_and_a_broken_connection_are_named():
    config = ServerConfig(url="http://127.0.0.1:9/v1", model="m", retries=1)
    with ChatServer(config, wait=lambda _: None) as server:
        assert ask_one(server, ask("hi")).reason == "the connection to the server failed"
    with ChatServer(ServerConfig(url=config.url)) as server, pytest.raises(UserError, match="no server answers"):
        ask_one(server, ask("hi"))


def test_time_outs_are_sent_again():
    late = threading.Event()

    def answer(request, number):
        if number == 0:
            late.wait(20)
        return completion("in time")

    with chat_server(answer) as found, open_server(found, timeout_seconds=0.3) as server:
        assert ask_one(server, ask("hi")).text == "in time"
        late.set()
    assert server.usage.retries == 1


def test_cached_replies_are_not_asked_for_again(tmp_path):
    cache = ReplyCache(tmp_path / "replies")
    with chat_server(echo) as found:
        with open_server(found, cache, price_input=1e6) as server:
            first = list(server.ask([ask("a"), ask("a"), ask("a", number=1), ask("b")]))
            assert server.usage.requests == 3 and server.cost == 30
        damaged = next(iter((tmp_path / "replies").rglob("*.json")))
        damaged.write_text('{"text": "half')
        with open_server(found, cache, price_input=1e6) as server:
            assert list(server.ask([ask("a"), ask("a"), ask("a", number=1), ask("b")])) == first
            assert (server.usage.requests, server.cost) == (1, 10) and server.usage.cached >= 2
            assert len(found.asked) == 4
            ask_one(server, ask("a", temperature=0.5))  # another request
            assert len(found.asked) == 5
    with ChatServer(ServerConfig(url=found.url, model="m"), cache) as server:  # the server is gone
        assert ask_one(server, ask("b")).cached
    assert not list((tmp_path / "replies").rglob("*.partial"))


def test_an_iteration_that_ends_early_keeps_what_was_paid_for(tmp_path):
    with chat_server(echo) as found, open_server(found, ReplyCache(tmp_path), concurrency=2) as server:
        assert len(list(islice(server.ask(ask(str(i)) for i in range(100)), 1))) == 1
        server.usage.as_dict()
    assert len(found.asked) <= 2 * 4 + 2
    assert len(list(tmp_path.rglob("*.json"))) == len(found.asked)


def test_the_limit_of_cost_stops_before_the_next_request():
    with (
        chat_server(echo) as found,
        open_server(found, concurrency=1, price_input=1e5, max_cost=2.5) as server,
        pytest.raises(UserError, match=r"the limit is 2\.5"),
    ):
        list(server.ask(ask(str(i)) for i in range(20)))
    assert len(found.asked) == 3  # each costs 1


def test_the_key_comes_from_the_environment_and_appears_nowhere(tmp_path, monkeypatch):
    key = "sk-secret-0123456789"
    monkeypatch.setenv("TEACHER_KEY", key)

    def answer(request, _):
        if said(request) == "fail":
            return fault(400, f"bad key {key}")
        return completion(f"your key is {key}", refusal=key)

    cache = ReplyCache(tmp_path)
    with chat_server(answer) as found, open_server(found, cache, key_env="TEACHER_KEY") as server:
        results = list(server.ask([ask("hi"), ask("fail")]))
    assert found.headers[0]["authorization"] == f"Bearer {key}"
    assert key not in repr(results) and results[0].text == "your key is [key]"
    assert key not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert key not in server.config.model_dump_json()
    with (
        chat_server(lambda *_: fault(401, f"wrong key: {key}")) as found,
        open_server(found, key_env="TEACHER_KEY") as server,
        pytest.raises(UserError, match="the key in TEACHER_KEY") as caught,
    ):
        ask_one(server, ask("hi"))
    assert key not in str(caught.value)


def test_a_key_is_sent_only_where_it_belongs(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert ServerConfig(url="https://api.openai.com/v1").key() == "sk-openai"
    assert ServerConfig(url="https://example.org/v1").key() == ""
    with chat_server(echo) as found, open_server(found) as server:
        ask_one(server, ask("hi"))
    assert "sk-openai" not in json.dumps(found.headers)
    with pytest.raises(UserError, match="unencrypted"):
        ServerConfig(url="http://example.org/v1", key_env="OPENAI_API_KEY").key()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which should hold the key, is not set"):
        ServerConfig(url="https://api.openai.com/v1").key()


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://me:secret@host/v1", "http://host/v1?key=secret", "host:80"])
def test_addresses_with_secrets_or_without_a_server_are_refused(url):
    with pytest.raises(ValueError, match="url: ") as caught:
        ServerConfig(url=url)
    assert "secret" not in str(caught.value.errors()[0]["msg"])


def test_the_model_is_the_only_one_that_the_server_lists():
    with chat_server(echo, models=("tiny",)) as found, ChatServer(ServerConfig(url=found.url)) as server:
        assert server.model == "tiny" and ask_one(server, ask("hi")).text == "re: hi"
    with (
        chat_server(echo, models=("a", "b")) as found,
        ChatServer(ServerConfig(url=found.url)) as server,
        pytest.raises(UserError, match="lists 2 models: a, b"),
    ):
        ask_one(server, ask("hi"))


def test_the_pace_spreads_requests_and_a_pause_holds_all_of_them():
    now = [100.0]
    pace = Pace(30, lambda: now[0])
    assert [pace.take() for _ in range(3)] == [0, 2, 4]
    now[0] += 10
    assert pace.take() == 0
    pace.hold(60)
    assert [pace.take(), pace.take()] == [60, 62]
    assert [Pace(None, lambda: 5.0).take() for _ in range(2)] == [0, 0]


def test_back_off_doubles_up_to_a_minute():
    chance = random.Random(0)
    waits = [backoff(attempt, chance) for attempt in range(9)]
    assert all(0.75 * limit <= seconds <= limit for seconds, limit in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60)))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers, seconds):
    assert retry_after(headers) == seconds
