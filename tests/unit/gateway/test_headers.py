from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from matrixinfer.gateway import headers

HOP_BY_HOP = ["Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"]


def multi(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "Proxy-Authorization", "Host", "Content-Length", "Expect"])
def test_a_header_of_one_connection_or_of_its_body_does_not_reach_the_pod(name: str) -> None:
    assert headers.to_pod(multi((name.upper(), "x"), ("A", "1")), "id", None) == CIMultiDict(
        {"A": "1", "x-request-id": "id"}
    )


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "Proxy-Authenticate"])
def test_a_header_of_one_connection_does_not_reach_the_client(name: str) -> None:
    passed = headers.to_client(multi((name, "x"), ("Content-Length", "5")), "id", "pod-a")
    assert passed == CIMultiDict(
        {"Content-Length": "5", "x-request-id": "id", "x-matrixinfer-pod": "pod-a", "server": "matrixinfer"}
    )


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("7", 7.0), (" 120 ", 120.0), ("", None), ("soon", None), ("-3", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_a_retry_after_is_read_as_seconds_or_a_date(given: str, seconds: float | None) -> None:
    assert headers.retry_after({"retry-after": given}) == seconds


def test_what_the_connection_header_names_stays_too() -> None:
    passed = headers.to_pod(multi(("Connection", "close, X-One ,x-two"), ("X-One", "1"), ("X-TWO", "2")), "id", None)
    assert list(passed) == ["x-request-id"]


def test_the_rank_chosen_replaces_the_one_that_the_client_names() -> None:
    sent = multi(("X-Data-Parallel-Rank", "7"))
    assert headers.to_pod(sent, "id", 1).getall("x-data-parallel-rank") == ["1"]
    assert "x-data-parallel-rank" not in headers.to_pod(sent, "id", None)


def test_repeated_headers_and_their_order_are_kept() -> None:
    passed = headers.to_client(multi(("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")), "id", "p")
    assert passed.getall("Set-Cookie") == ["a=1", "b=2"]


def test_what_a_pod_says_about_itself_is_replaced_by_what_the_gateway_knows() -> None:
    passed = headers.to_client(multi(("X-Request-ID", "theirs"), ("X-MatrixInfer-Pod", "b")), "id", "a")
    assert passed.getall("x-request-id") == ["id"]
    assert passed.getall("x-matrixinfer-pod") == ["a"]


@given(st.text(max_size=200))
def test_a_request_id_is_always_short_and_printable(given_id: str) -> None:
    identity = headers.request_id({"x-request-id": given_id})
    assert 1 <= len(identity) <= 128
    assert identity.isascii()
    assert identity.isprintable()
    assert " " not in identity
    if identity != given_id:
        assert len(identity) == 32


def test_a_session_id_of_insane_length_is_none() -> None:
    assert headers.session_id({}) is None
    assert headers.session_id({"x-session-id": ""}) is None
    assert headers.session_id({"x-session-id": "s" * 256}) == "s" * 256
    assert headers.session_id({"x-session-id": "s" * 257}) is None
    assert headers.session_id({"x-session-id": "s" * 200, "x-claude-code-agent-id": "a" * 200}) is None


@pytest.mark.parametrize("name", headers.SESSIONS)
def test_sessions_are_known_by_the_headers_of_agents_and_routers(name: str) -> None:
    given = CIMultiDict({name.title(): "s1"})
    assert headers.session_id(given) == "s1"
    given["X-Session-ID"] = "s2"
    assert headers.session_id(given) == "s2"
    given["X-Claude-Code-Agent-Id"] = "a1"
    assert headers.session_id(given) == "s2/a1"
