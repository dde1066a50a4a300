"""Brings together what each source lists. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matrixinfer.config import PodConfig

CONFIG = "config"
"""The source of the pods that the config file lists."""
ADMIN = "admin"
"""The source of the pods that operators add at run time."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A pod, and the source that lists it."""

    config: PodConfig
    source: str


class Membership:
    """The last list of every source. Of two pods with one name, or with one URL, the source that comes first wins."""

    def __init__(self) -> None:
        self._order: tuple[str, ...] = (CONFIG, ADMIN)
        self._lists: dict[str, tuple[PodConfig, ...]] = {}
        self._out: set[str] = set()

    def order(self, sources: Sequence[str]) -> None:
        """Set the sources beside `CONFIG` and `ADMIN`, in the order of precedence; drop what others have listed."""
        self._order = (CONFIG, ADMIN, *sources)
        self._lists = {source: pods for source, pods in self._lists.items() if source in self._order}
        self._keep_out()

    def listed_by(self, source: str) -> tuple[PodConfig, ...]:
        """The last list of a source."""
        return self._lists.get(source, ())

    def replace(self, source: str, pods: Sequence[PodConfig]) -> None:
        """A source lists these pods from now on. Lists of sources that are not in the order are ignored."""
        if source in self._order:
            self._lists[source] = tuple(pods)
            self._keep_out()

    def take_out(self, name: str) -> None:
        """Leave a pod out, whoever lists it, until `put_back`, or until nobody lists it any more."""
        self._out.add(name)
        self._keep_out()

    def put_back(self, name: str) -> bool:
        """Undo `take_out`. Returns whether the pod was left out."""
        was_out = name in self._out
        self._out.discard(name)
        return was_out

    def is_out(self, name: str) -> bool:
        """Whether the pod is left out although a source lists it."""
        return name in self._out

    def wanted(self) -> Mapping[str, Listed]:
        """The pods that there should be, by name."""
        return {name: each for name, each in self.listed().items() if name not in self._out}

    def listed(self) -> Mapping[str, Listed]:
        """The same with those that are left out."""
        found: dict[str, Listed] = {}
        urls: set[str] = set()
        for source, pod in self._all():
            if pod.name not in found and (source == CONFIG or pod.url not in urls):
                found[pod.name] = Listed(pod, source)
                urls.add(pod.url)
        return found

    def ignored(self) -> Mapping[tuple[str, str], str]:
        """Why pods are ignored that another source lists as well, by source and name."""
        found = self.listed()
        by_url = {each.config.url: name for name, each in found.items()}
        reasons: dict[tuple[str, str], str] = {}
        for source, pod in self._all():
            first = found.get(pod.name)
            if first is None:
                reasons[source, pod.name] = f"its URL is that of pod `{by_url[pod.url]}`"
            elif first.source != source:
                reasons[source, pod.name] = f"source `{first.source}` lists a pod of that name"
        return reasons

    def _all(self) -> Iterator[tuple[str, PodConfig]]:
        for source in self._order:
            for pod in self._lists.get(source, ()):
                yield source, pod

    def _keep_out(self) -> None:
        self._out &= {pod.name for _, pod in self._all()}
