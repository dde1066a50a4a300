"""What is learnt of media from an engine's events, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.prompt.outline import Outline
from matrixinfer.trust.media import MediaNames, Watched
from tests.unit.kvevents.support import MODEL, POD, Follower, stored

PAD, END = 900, 901
TEXT = list(range(100, 120))
OUTLINE = [1, 2, 3, PAD, END, *TEXT, PAD, END, *TEXT, 7]
CAT, DOG, COW = b"cat".ljust(32), b"dog".ljust(32), b"cow".ljust(32)
SIZES = {"hash-cat": 9, "hash-dog": 14, "hash-cow": 9}


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.engine = Follower(TokenBlockProcessor(4))
        self.names = MediaNames(lambda: self.now)
        self.is_whole = True

    @property
    def ledger(self) -> Ledger:
        return self.engine.ledger

    def watch(self, contents: Sequence[bytes] = (CAT, DOG), salt: str | None = None) -> Watched:
        watched = self.names.watch(POD, self.ledger, MODEL, salt, outline(contents), lambda: self.is_whole)
        assert watched is not None
        return watched

    def store(self, *names: str, first: int = 0, last: int | None = None, salt: str | None = None) -> int:
        """The engine stores the blocks of the prompt with these media; returns its tokens."""
        ids, media = prompt(names)
        keys: list[Any] = []
        for start in range(0, len(ids) // 4 * 4, 4):
            inside = [[name, at - start] for at, name in media if at < start + 4 and start < at + SIZES[name]]
            keys.append((inside + ([salt] if salt and not start else [])) or None)
        blocks = [hash((names[: sum(at < (i + 1) * 4 for at, _ in media)], salt, i)) % 2**60 for i in range(len(keys))]
        last = len(keys) if last is None else last
        parent = blocks[first - 1] if first else None
        tokens = ids[first * 4 : last * 4]
        self.engine.apply(stored(blocks[first:last], tokens, parent=parent, extra_keys=keys[first:last]))
        return len(ids)

    def close(self, watched: Watched, tokens: int, cached: int | None = 0, wait: float = 3.0) -> None:
        watched.reported(tokens, cached)
        self.names.close(watched)
        self.now += wait

    def known(self, contents: Sequence[bytes] = (CAT, DOG)) -> tuple[list[int], list[tuple[int, str]]] | None:
        found = self.names.expand(MODEL, outline(contents))
        return None if found is None else (found[0].tolist(), found[1])


def outline(contents: Sequence[bytes]) -> Outline:
    return Outline(ids=np.array(OUTLINE, dtype=np.uint32), contents=tuple(contents))


def prompt(names: Sequence[str]) -> tuple[list[int], list[tuple[int, str]]]:
    ids: list[int] = []
    media = []
    left = list(names)
    for token in OUTLINE:
        if token == PAD:
            name = left.pop(0)
            media.append((len(ids), name))
            ids += [PAD] * SIZES[name]
        else:
            ids.append(token)
    return ids, media


@pytest.fixture
def world() -> World:
    return World()


def test_what_a_request_stored_shows_the_whole_prompt_of_the_next_one(world: World) -> None:
    watched = world.watch()
    world.close(watched, world.store("hash-cat", "hash-dog"))
    assert world.known() == prompt(["hash-cat", "hash-dog"])
    assert world.known([DOG, CAT]) == prompt(["hash-dog", "hash-cat"])
    ids, media = prompt(["hash-cat", "hash-dog"])
    assert world.engine.held(ids, media=media) == len(ids) // 4 * 4
    assert world.known([CAT, COW]) is None


def test_events_may_come_in_pieces_and_after_the_answer(world: World) -> None:
    watched = world.watch(salt="s")
    tokens = world.store("hash-cat", "hash-dog", last=9, salt="s")
    world.close(watched, tokens, wait=1.0)
    assert world.known() is None
    world.store("hash-cat", "hash-dog", first=9, salt="s")
    world.now += 2.0
    assert world.known() == prompt(["hash-cat", "hash-dog"])


@pytest.mark.parametrize(
    ("cached", "more"),
    [(None, 0), (68, 0), (0, 4)],
    ids=["not reported", "all found in the cache", "another count of tokens"],
)
def test_an_answer_that_does_not_confirm_teaches_nothing(world: World, cached: int | None, more: int) -> None:
    watched = world.watch()
    world.close(watched, world.store("hash-cat", "hash-dog") + more, cached)
    assert len(world.names) == 0
    assert world.known() is None


def test_media_that_were_found_are_learnt_from_what_is_stored_after_them(world: World) -> None:
    world.store("hash-cat", "hash-dog", last=12)
    watched = world.watch()
    world.close(watched, world.store("hash-cat", "hash-dog", first=12), cached=48)
    assert world.known() == prompt(["hash-cat", "hash-dog"])


@pytest.mark.parametrize("first", [0, 1], ids=["as if they were found", "copies"])
def test_what_is_stored_again_is_seen_as_well(world: World, first: int) -> None:
    world.store("hash-cat", "hash-dog")
    watched = world.watch()
    world.store("hash-cow", "hash-dog")
    world.close(watched, world.store("hash-cat", "hash-dog", first=first))
    assert len(world.names) == 0


def test_events_that_may_be_lost_teach_nothing(world: World) -> None:
    watched = world.watch()
    tokens = world.store("hash-cat", "hash-dog")
    world.is_whole = False
    world.close(watched, tokens)
    assert world.known() is None


def test_a_medium_with_a_uuid_is_known_by_the_uuid_alone(world: World) -> None:
    uuid = b"u" * 32
    watched = world.watch([uuid + b"d" * 32, DOG])
    world.close(watched, world.store("hash-cat", "hash-dog"))
    assert world.known([uuid, DOG]) == world.known([uuid + b"d" * 32, DOG]) == prompt(["hash-cat", "hash-dog"])
    assert world.known([uuid + b"e" * 32, DOG]) is None


def test_another_prompt_at_the_same_time_with_other_images_teaches_nothing(world: World) -> None:
    one, other = world.watch(), world.watch([COW, DOG])
    tokens = world.store("hash-cat", "hash-dog")
    assert world.store("hash-cow", "hash-dog") == tokens
    world.close(one, tokens)
    world.close(other, tokens)
    assert world.known() is None
    assert world.known([COW, DOG]) is None


@pytest.mark.parametrize("salt", [None, "other"])
def test_a_chain_of_another_salt_teaches_nothing(world: World, salt: str | None) -> None:
    watched = world.watch(salt="mine")
    world.close(watched, world.store("hash-cat", "hash-dog", salt=salt))
    assert world.known() is None


def test_a_content_with_two_names_is_known_no_more(world: World) -> None:
    for name in ("hash-cat", "hash-cow", "hash-cat"):
        watched = world.watch()
        world.close(watched, world.store(name, "hash-dog"))
        world.known()
    assert world.known() is None
    assert world.known([DOG, DOG]) is not None


def test_an_endpoint_that_has_gone_teaches_nothing(world: World) -> None:
    watched = world.watch()
    tokens = world.store("hash-cat", "hash-dog")
    world.names.forget(POD)
    world.close(watched, tokens)
    assert world.known() is None


@given(data=st.data())
def test_a_name_is_never_that_of_another_image(data: st.DataObject) -> None:
    """Requests that overlap in any way, of images of equal length, each stored by the engine as it computes it."""
    world, truth = World(), {CAT: "hash-cat", COW: "hash-cow"}
    held: set[str] = set()
    open_requests: list[tuple[Watched, str]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        closes = data.draw(st.booleans())
        if open_requests and closes:
            watched, name = open_requests.pop(data.draw(st.integers(0, len(open_requests) - 1)))
            cached = len(prompt([name, "hash-dog"])[0]) // 4 * 4 if name in held else 0
            if name not in held:
                world.store(name, "hash-dog")
                held.add(name)
            world.close(
                watched, len(prompt([name, "hash-dog"])[0]), cached, wait=data.draw(st.sampled_from([0.0, 3.0]))
            )
        else:
            content = data.draw(st.sampled_from(sorted(truth)))
            open_requests.append((world.watch([content, DOG]), truth[content]))
        for content, name in truth.items():
            found = world.known([content, DOG])
            assert found is None or found == prompt([name, "hash-dog"])


def test_the_chains_that_are_kept_of_a_request_are_bounded_in_number(world: World) -> None:
    watched = world.watch()
    for number in range(200):
        SIZES[f"hash-{number}"] = 9
        world.store(f"hash-{number}", "hash-dog")
        assert len(watched.seen) <= 64
        del SIZES[f"hash-{number}"]
    world.close(watched, world.store("hash-cat", "hash-dog"))
    assert world.known() is None
