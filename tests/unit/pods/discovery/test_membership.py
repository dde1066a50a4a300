from __future__ import annotations

from matrixinfer.config import PodConfig
from matrixinfer.pods.discovery.membership import ADMIN, CONFIG, Membership


def pod(name: str, url: str | None = None) -> PodConfig:
    return PodConfig(name=name, url=url or f"http://{name}:8000")


def membership(*sources: str) -> Membership:
    made = Membership()
    made.order(sources)
    return made


def test_the_pods_of_all_sources_are_wanted() -> None:
    pods = membership("file:x", "dns:y")
    pods.replace("dns:y", [pod("c")])
    pods.replace("file:x", [pod("b")])
    pods.replace(ADMIN, [pod("d")])
    pods.replace(CONFIG, [pod("a")])
    assert {name: each.source for name, each in pods.wanted().items()} == {
        "a": CONFIG,
        "d": ADMIN,
        "b": "file:x",
        "c": "dns:y",
    }


def test_of_two_pods_with_one_name_the_first_source_wins_whatever_came_first() -> None:
    pods = membership("file:x")
    pods.replace("file:x", [pod("a", "http://other:1")])
    pods.replace(CONFIG, [pod("a")])
    assert pods.wanted()["a"].config.url == "http://a:8000"
    assert pods.ignored() == {("file:x", "a"): "source `config` lists a pod of that name"}
    pods.replace(CONFIG, [])
    assert pods.wanted()["a"].config.url == "http://other:1"
    assert pods.ignored() == {}


def test_one_engine_is_not_taken_for_two() -> None:
    pods = membership("dns:y")
    pods.replace(CONFIG, [pod("a", "http://10.0.0.1:8000")])
    pods.replace("dns:y", [pod("10.0.0.1:8000", "http://10.0.0.1:8000")])
    assert list(pods.wanted()) == ["a"]
    assert pods.ignored() == {("dns:y", "10.0.0.1:8000"): "its URL is that of pod `a`"}


def test_what_is_taken_out_stays_out_until_its_source_drops_it_and_lists_it_again() -> None:
    pods = membership()
    pods.replace(CONFIG, [pod("a"), pod("b")])
    pods.take_out("a")
    assert list(pods.wanted()) == ["b"]
    pods.replace(CONFIG, [pod("a")])
    assert list(pods.wanted()) == []
    pods.replace(CONFIG, [])
    pods.replace(CONFIG, [pod("a")])
    assert list(pods.wanted()) == ["a"]


def test_what_is_taken_out_can_be_put_back() -> None:
    pods = membership()
    pods.replace(CONFIG, [pod("a")])
    pods.take_out("a")
    assert pods.put_back("a")
    assert not pods.put_back("a")
    assert list(pods.wanted()) == ["a"]


def test_lists_of_sources_that_are_gone_do_not_count() -> None:
    pods = membership("file:x")
    pods.replace("file:x", [pod("a")])
    pods.order([])
    assert pods.wanted() == {}
    pods.replace("file:x", [pod("a")])  # a last answer of a source that is being ended
    assert pods.wanted() == {}
