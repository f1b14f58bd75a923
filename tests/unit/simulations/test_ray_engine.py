"""The Ray engine without Ray: who gets which message, what a death does, and what is said when Ray is not there."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from pydantic import ValidationError

pytest.importorskip("ray", reason="needs the extra 'ray'")

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from common.errors import ConfigError, ConnectionFailed, OutputError, RunFailed
from common.sections import SimulationSection
from simulations import ray_actors, ray_cluster, ray_engine
from simulations.ray_actors import DiedEarly, Hired, NoRoom, dealt_out
from simulations.ray_engine import AHEAD, DEATHS, RayEngine, RayGrid
from simulations.ray_sites import Footing, Introduction, Served, client_app

FOOTING = Footing("code", "torch", "model", "adapter", "data")


class Cluster:
    """Stands for Ray, and for an employer: an actor answers when it is waited for, the last one first.

    Attributes:
        fatal: sites whose message kills the actor that works on it, and how often.
        room: actors that the nodes have room for.
        early: so many of the next actors die before they can serve.
    """

    def __init__(self) -> None:
        self.fatal: dict[str, int] = {}
        self.faulty: set[str] = set()
        self.room, self.early = 2, 0
        self.number = 0
        self.begun: list[tuple[int, Message, str]] = []
        self.served: list[tuple[int, str]] = []
        self.dead: set[int] = set()
        self.most_ahead = 0

    def hire(self, count: int, beside: int = 0) -> list[Hired]:
        if self.early:
            self.early -= 1
            raise DiedEarly("died while it loaded")
        if count + beside > self.room:
            raise NoRoom("no room")
        return [self._actor() for _ in range(count)]

    def wanted(self) -> int:
        return self.room

    def _actor(self) -> Hired:
        self.number += 1
        number = self.number

        def serve(message: Message, site: str) -> int:
            self.begun.append((number, message, site))
            ahead = [one for one, _, _ in self.begun[len(self.served) :]]
            self.most_ahead = max(self.most_ahead, *(ahead.count(one) for one in ahead))
            return len(self.begun) - 1

        handle = SimpleNamespace(
            serve=SimpleNamespace(remote=serve),
            open=SimpleNamespace(remote=lambda assignment: None),
            close=SimpleNamespace(remote=lambda: None),
            number=number,
        )
        return Hired(handle, Introduction("here", number, FOOTING, True))

    # ---- what the engine calls of the module ---------------------------------------------------------------------

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references[-1:], references[:-1]  # an unfair cluster

    def kill(self, handle: Any) -> None:
        self.dead.add(handle.number)

    def get(self, reference: Any) -> Any:
        if not isinstance(reference, int):
            return reference
        number, message, site = self.begun[reference]
        if self.fatal.get(site, 0) and number not in self.dead:
            self.fatal[site] -= 1
            self.dead.add(number)
        if number in self.dead:
            raise ActorDiedError()
        if site in self.faulty:
            raise RayTaskError("serve", "", ValueError("\nException X occurred. Message: the disk is full"))
        self.served.append((number, site))
        return Served(Message(RecordDict({"site": ConfigRecord({"name": site})}), reply_to=message), ())


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, RayGrid]]:
    """Two actors and six sites, a to f, of equal size."""
    stand_in = Cluster()
    monkeypatch.setattr(ray_engine, "ray", stand_in)
    engine = RayEngine.__new__(RayEngine)
    engine.posts, engine._employer = [], stand_in  # type: ignore[assignment]
    engine._sizes = dict.fromkeys("abcdef", 10)
    engine._home, engine._tasks, engine._replies = {}, {}, {}
    engine._assignment = None  # type: ignore[assignment]
    with engine:
        yield stand_in, RayGrid("abcdef", engine)


def ask(grid: RayGrid, ttl: float = 60.0) -> list[str]:
    """One message to each site; the sites in the order in which their replies are handed over."""
    messages = [grid.create_message(RecordDict(), "train", node, "run", ttl) for node in grid.get_node_ids()]
    waiting, names = list(grid.push_messages(messages)), []
    while waiting and (replies := list(grid.pull_messages(waiting))):
        for reply in replies:
            waiting.remove(reply.metadata.reply_to_message_id)
            names.append(str(reply.content["site"]["name"]))  # type: ignore[index]
    return names


def test_replies_are_handed_over_in_the_order_of_the_messages_whichever_actor_is_faster(
    running: tuple[Cluster, RayGrid],
) -> None:
    stand_in, grid = running
    assert ask(grid) == list("abcdef")
    assert [site for _, site in stand_in.served] != list("abcdef")
    assert stand_in.most_ahead <= 2 * AHEAD


def test_a_site_is_always_served_by_the_same_actor(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    ask(grid)
    ask(grid)
    assert len(stand_in.served) == 12 and len(set(stand_in.served)) == 6
    assert [sum(number == actor for number, _ in set(stand_in.served)) for actor in (1, 2)] == [3, 3]


def test_an_actor_that_dies_is_replaced_and_its_messages_are_sent_again(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    stand_in.fatal["c"] = 1
    assert ask(grid) == list("abcdef")
    assert stand_in.number == 3 and len(grid.engine.posts) == 2
    assert not {number for number, _ in stand_in.served[-6:]} - {1, 2, 3}
    assert ask(grid) == list("abcdef") and not {number for number, _ in stand_in.served[-6:]} & stand_in.dead


def test_without_room_for_another_actor_the_others_take_over_the_sites(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    stand_in.fatal["c"], stand_in.room = 1, 1
    assert ask(grid) == list("abcdef") and ask(grid) == list("abcdef")
    assert stand_in.number == 2 and len({number for number, _ in stand_in.served[-6:]}) == 1


def test_a_new_actor_that_dies_too_is_replaced_by_another_but_not_for_ever(
    running: tuple[Cluster, RayGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "LOOK_SECONDS", 0.0)
    stand_in, grid = running
    stand_in.fatal["c"], stand_in.early = 1, DEATHS - 1
    assert ask(grid) == list("abcdef") and stand_in.number == 3
    stand_in.fatal["c"], stand_in.early = 1, DEATHS
    with pytest.raises(DiedEarly):
        ask(grid)


def test_with_the_last_actor_gone_the_run_fails(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    stand_in.fatal.update(a=1, b=1, c=1, d=1, e=1, f=1)
    stand_in.room = 0
    with pytest.raises(RunFailed, match="no node is left"):
        ask(grid)


def test_a_site_that_kills_every_actor_fails_the_run(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    stand_in.fatal["d"] = 99
    with pytest.raises(RunFailed, match=rf"site 'd': {DEATHS} actors died over it .* --resume"):
        ask(grid)
    assert stand_in.number == 2 + DEATHS - 1


def test_a_fault_at_a_site_is_told_without_flowers_words(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    stand_in.faulty.add("b")
    with pytest.raises(RunFailed, match=r"^site 'b': the disk is full; mend the cause, then --resume$"):
        ask(grid)


def test_a_message_whose_time_is_over_is_neither_worked_on_nor_waited_for(running: tuple[Cluster, RayGrid]) -> None:
    stand_in, grid = running
    assert ask(grid, ttl=1e-9) == []
    assert stand_in.begun == [] and not grid.engine._tasks
    assert ask(grid) == list("abcdef")


def test_sites_are_dealt_out_in_equal_numbers_and_about_equal_rows() -> None:
    # By size: 9 → first, 8 → second, 7 → second, 6 → first, 5 → first, 1 → second.
    assert dealt_out({"a": 1, "b": 9, "c": 6, "d": 8, "e": 7, "f": 5}, 2) == [["b", "c", "f"], ["d", "e", "a"]]
    assert dealt_out({"a": 1}, 1) == [["a"]]


def test_the_mark_in_the_runs_folder_is_there_only_while_actors_look_for_it(tmp_path: Path) -> None:
    with ray_actors._mark(tmp_path / "not" / "there" / "yet") as mark:
        assert mark.is_file() and mark.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be written"), ray_actors._mark(Path("/proc/self/none")):
        pass


def actors(room: int, **settings: Any) -> int:
    section = SimulationSection(engine="ray", **settings)
    employer = ray_actors.Employer(SimpleNamespace(simulation=section), Path(), FOOTING)  # type: ignore[arg-type]
    return employer.wanted()


def test_as_many_actors_as_there_is_room_for_unless_fewer_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_room(count: int) -> None:
        def room(resources: dict[str, float]) -> int:
            if not count:
                raise ValueError("ActorPool is empty")  # as Flower does
            return count

        monkeypatch.setattr(ray_actors, "pool_size_from_resources", room)

    with_room(3)
    assert actors(3) == 3 and actors(3, actors=2) == 2
    with pytest.raises(ConfigError, match=r"simulation.actors = 4: .* room for 3 actors \(1 CPUs and 0 GPUs each\)"):
        actors(3, actors=4)
    with_room(0)
    with pytest.raises(ConfigError, match=r"room for 0 actors \(1 CPUs and 0.5 GPUs each\)"):
        actors(0, gpus_per_actor=0.5)


def test_an_actor_is_not_waited_for_when_the_node_it_was_meant_for_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    room, killed = [2, 2, 1], []

    def remote(*given: object) -> str:
        return "pending"

    handle = SimpleNamespace(load=SimpleNamespace(remote=remote))
    kind = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda: handle))
    stand_in = SimpleNamespace(remote=lambda actor: kind, wait=lambda refs, timeout: ([], refs), kill=killed.append)
    monkeypatch.setattr(ray_actors, "ray", stand_in)
    monkeypatch.setattr(ray_actors, "pool_size_from_resources", lambda resources: room.pop(0))
    section = SimulationSection(engine="ray")
    employer = ray_actors.Employer(SimpleNamespace(simulation=section), Path(), FOOTING)  # type: ignore[arg-type]
    with pytest.raises(NoRoom, match="has lost nodes, and has no room for 2 actors"):
        employer.hire(1, beside=1)
    assert killed == [handle] and not room


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'consilium\[ray\]'"),
        ray_cluster.cluster(SimulationSection(engine="ray")),
    ):
        pass
    with ray_cluster.cluster(SimulationSection()):  # in-process: Ray is not even looked for
        pass


@pytest.mark.parametrize("listens", [True, False])
def test_a_wrong_address_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWERS_WITHIN", 0.5)
    with socket.socket() as other:  # something else than Ray, or nothing at all
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        section = SimulationSection(engine="ray", ray_address=f"127.0.0.1:{other.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ConnectionFailed, match="no Ray answers there"), ray_cluster.cluster(section):
            pass
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "ray", "workers": 2},
        {"engine": "ray", "sites_per_pass": 2},
        {"ray_address": "http://head:6379"},
        {"ray_address": "head"},
        {"cpus_per_actor": 0},
        {"gpus_per_actor": -1},
        {"actors": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SimulationSection(**settings)


def test_a_message_takes_flowers_way_to_the_site_that_its_context_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import Context

    asked: list[object] = []

    def relay(content: RecordDict, site: object) -> RecordDict:
        asked.append(site)
        return content

    monkeypatch.setattr("simulations.ray_sites.relay_train", relay)
    app: Callable[[Message, Context], Message] = client_app({"north": "N", "south": "S"})  # type: ignore[dict-item]
    grid = RayGrid(["north", "south"], None)  # type: ignore[arg-type]
    message = grid.create_message(RecordDict(), "train", 2, "run")
    app(message, Context(0, 2, {"site": "south"}, RecordDict(), {}))
    assert asked == ["S"]


def test_rays_errors_are_one_line() -> None:
    assert ray_actors.first_line(RayError("\n first \nadvice")) == "first"
    assert ray_actors.first_line(RayError()) == "RayError"
