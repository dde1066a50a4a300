"""What a page is sent: everything at first, then what has changed."""

from __future__ import annotations

import msgspec

from matrixinfer.dashboard.fleet import EndpointRow
from matrixinfer.dashboard.history import BUCKET_SECONDS, BUCKETS
from matrixinfer.dashboard.live import DECISIONS, About, Live, View
from tests.browser.world import World


def live(world: World) -> Live:
    about = About(version="1", api="http://a", decisions_kept=10)
    return Live(world.fleet(), world.history, world.decisions, lambda: about, world.clock, world.wall)


class Page:
    """Keeps what it was sent, as the page does."""

    def __init__(self) -> None:
        self.version = 0
        self.rows: dict[str, EndpointRow] = {}
        self.names: list[str] = []
        self.requests: dict[int, int] = {}

    def take(self, view: View) -> None:
        self.version = view.version
        self.rows |= {row.name: row for row in view.endpoints or ()}
        if view.names is not None:
            self.names = view.names
            self.rows = {name: self.rows[name] for name in view.names}
        self.requests |= {point.number: point.requests for point in view.points}


def fields(view: View) -> set[str]:
    return set(msgspec.to_builtins(view))


def test_a_first_view_is_whole_and_a_later_one_has_what_changed() -> None:
    world = World(3)
    shown = live(world)
    first = shown.view()
    assert fields(first) >= {"about", "names", "endpoints", "models", "decisions", "points", "hour"}
    assert first.names == world.names
    world.shift += 1.0
    second = shown.view(first.version)
    assert fields(second) == {"version", "at", "up_s", "hour", "points"}
    world.die("pod-1.inference")
    world.shift += 1.0
    third = shown.view(second.version)
    assert [(row.name, row.state) for row in third.endpoints or ()] == [("pod-1.inference", "down")]
    assert third.names is None


def test_a_page_that_follows_changes_knows_what_a_new_one_is_sent() -> None:
    world = World(4)
    shown, page = live(world), Page()
    for step in range(300):
        world.request(status=None if step % 50 == 7 else 200)
        if step % 30 == 11:
            world.die(world.draw.choice(world.names))
        if step % 30 == 23:
            world.registry.answered(world.draw.choice(world.names))
        if step == 150:
            world.registry.leave("pod-2.inference")
        world.shift += world.draw.choice((0.1, 1.0, 20.0))
        if step % 3:
            page.take(shown.view(page.version))
    world.shift += 1.0
    page.take(shown.view(page.version))
    new = Page()
    new.take(shown.view())
    assert page.names == new.names == [name for name in world.names if name != "pod-2.inference"]
    assert page.rows == new.rows
    known = {number: count for number, count in page.requests.items() if number in new.requests}
    assert known == new.requests


def test_pages_share_what_was_read_within_a_moment() -> None:
    world = World(2)
    shown = live(world)
    assert shown.view().version == shown.view().version
    world.shift += 1.0
    assert shown.view().version == 2


def test_a_version_that_is_not_known_gets_everything() -> None:
    world = World(2)
    shown = live(world)
    shown.view()
    assert "about" in fields(shown.view(1_000))
    for _ in range(BUCKETS + 1):
        world.shift += BUCKET_SECONDS
        shown.view()
    assert "about" in fields(shown.view(1))
    assert len(shown.numbers) == BUCKETS


def test_the_last_decisions_are_shown_newest_first() -> None:
    world = World(2)
    made = [world.request() for _ in range(DECISIONS + 5)]
    decisions = live(world).view().decisions
    assert decisions is not None
    assert [row.id for row in decisions] == [each.id for each in reversed(made[5:])]
    assert decisions[0].is_over
    assert decisions[0].status == 200


def test_why_an_endpoint_gets_nothing_is_said() -> None:
    world = World(4)
    world.die("pod-0.inference")
    for _ in range(5):
        world.outliers.failed("pod-1.inference", "500")
    world.outliers.busy("pod-2.inference", retry_after=5.0)
    rows = {row.name.split(".")[0]: row for row in live(world).view().endpoints or ()}
    assert {name: row.state for name, row in rows.items()} == {
        "pod-0": "down",
        "pod-1": "ejected",
        "pod-2": "busy",
        "pod-3": "up",
    }
    assert rows["pod-0"].state_reason == "has not answered 2 times in a row"
    assert (rows["pod-1"].state_reason or "").startswith("ejected for")
    assert rows["pod-3"].state_reason is None


def test_a_pod_that_drains_says_since_when_and_when_it_leaves() -> None:
    world = World(2)
    world.drain("pod-1.inference", 60.0)
    shown = live(world)
    world.shift += 12.0
    row = {row.name: row for row in shown.view().endpoints or ()}["pod-1.inference"]
    assert (row.state, row.leaves_in_s) == ("draining", 48)
    assert row.state_reason == "gets no more requests since 12 s, leaves in 48 s at the latest"
    world.die("pod-1.inference")
    world.shift += 100.0
    row = {row.name: row for row in shown.view().endpoints or ()}["pod-1.inference"]
    assert (row.state, row.leaves_in_s) == ("draining", 0)
    assert (row.state_reason or "").endswith("; has not answered 2 times in a row")


def test_a_pod_in_slow_start_says_its_share_while_others_of_its_model_are_there_for_longer() -> None:
    world = World(3)
    world.slow_start_seconds = 100.0
    shown = live(world)

    def states() -> dict[str, tuple[str, float | None]]:
        world.shift += 1.0
        return {row.name.split(".")[0]: (row.state, row.share) for row in shown.view().endpoints or ()}

    assert set(states().values()) == {("up", None)}  # all came up just now
    world.shift += 200.0
    world.die("pod-2.inference")
    world.registry.answered("pod-2.inference")
    assert states() == {"pod-0": ("up", None), "pod-1": ("up", None), "pod-2": ("slow_start", 0.1)}
    before = shown.view().version
    world.shift += 1.0
    assert not shown.view(before).endpoints  # a moment changes no row
    world.shift += 48.0
    assert states()["pod-2"] == ("slow_start", 0.5)
    world.shift += 50.0
    assert states()["pod-2"] == ("up", None)


def test_what_is_unknown_is_not_zero() -> None:
    world = World(1)
    world.caches.trust["pod-0.inference"] = "none"
    world.shift += 3_600.0  # the engine's metrics are old
    row = next(iter(live(world).view().endpoints or ()))
    unknown = (row.running, row.waiting, row.cache_usage, row.held_tokens, row.hit_rate, row.feed, row.engine_block)
    assert set(unknown) == {None}
    assert (row.in_flight, row.requests) == (0, 0)
