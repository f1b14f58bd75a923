"""Who takes part in a run: names, late sites, refusals, resumption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

import server.roster as roster_module
from common import wire
from common.config import RunConfig
from common.errors import RunFailed
from common.messages import PhaseStatement, PlanStatus, PrivacyStatement, RefusalReason, SiteDescription
from common.plan import Plan, plan_of
from common.signing import SigningKey
from common.toml_settings import validate
from server.checkpoint import RunFolder
from server.mailbox import Mailbox
from server.roster import Roster
from simulations.grid import SimulatedGrid

PHASE = {"name": "head", "rounds": 3, "sample_rate": 1.0, "clip_norm": 1.0, "train": ["head"]}
STATEMENT = PrivacyStatement(
    8.0, 1e-5, "example", "add-remove-one", "prv", 3, (PhaseStatement("head", 1.0, 1.0, 1.0, 3),)
)
Answer = Callable[[], RecordDict | None]


def _site(name: str, status: PlanStatus = PlanStatus.READY, refusal: RefusalReason | None = None) -> SiteDescription:
    privacy = STATEMENT if status is PlanStatus.READY else None
    return SiteDescription(name, status, refusal, "c" * 64, ("sequence-classification",), 64, 100, privacy)


def _says(*answers: SiteDescription) -> Answer:
    """Gives these answers in turn, and the last of them for ever."""
    left = list(answers)
    return lambda: wire.description_to_record(left.pop(0) if len(left) > 1 else left[0])


class Nodes(SimulatedGrid):
    """Nodes that answer as a test says; ``None`` is no answer yet."""

    def __init__(self, answers: Mapping[int, Answer], names: Mapping[int, str] | None = None) -> None:
        super().__init__({})
        self.answers, self.names = dict(answers), names or {}
        self.asked: list[int] = []
        self._queue: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = {message.metadata.message_id: message for message in messages}
        self._queue.update(kept)
        return list(kept)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node)) for node in self.answers]

    def pull_messages(self, message_ids: object) -> list[Message]:
        for identity in list(message_ids):  # type: ignore[call-overload]
            message = self._queue[identity]
            content = self.answers[message.metadata.dst_node_id]()
            if content is not None:
                del self._queue[identity]
                self.asked.append(message.metadata.dst_node_id)
                return [Message(content, reply_to=message)]
        return []


@pytest.fixture
def plan() -> Plan:
    config = validate(RunConfig, {"task": {"labels": ["a", "b"]}, "phase": [PHASE]}, "test")
    return plan_of(config, "run-1", "m" * 64, "a" * 64, "c" * 64)


@pytest.fixture
def open_roster(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Roster]:
    """A roster over these nodes that asks without a pause."""
    monkeypatch.setattr(roster_module, "ASK_AGAIN_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(roster_module, "_FIRST_LOOK_SECONDS", 0.0)

    def build(grid: Nodes) -> Roster:
        return Roster(Mailbox(grid, plan.run_id, 0.0), plan, SigningKey.fresh(), RunFolder(tmp_path))

    return build


def test_all_nodes_that_are_online_are_heard_before_a_run_begins(open_roster: Callable[..., Roster]) -> None:
    roster = open_roster(Nodes({1: _says(_site("north")), 2: _says(_site("south"))}))
    roster.gather(1, 60.0)
    assert {site: one.node for site, one in roster.participants.items()} == {"north": 1, "south": 2}
    assert roster.absent == {}


def test_a_node_speaks_only_for_the_site_it_was_registered_for(open_roster: Callable[..., Roster]) -> None:
    grid = Nodes({1: _says(_site("north")), 2: _says(_site("north"))}, {1: "north", 2: "west"})
    roster = open_roster(grid)
    roster.gather(1, 60.0)
    assert roster.participants["north"].node == 1
    assert roster.absent == {"west": "wrong-site"}


def test_without_registered_names_the_first_to_claim_a_name_has_it(open_roster: Callable[..., Roster]) -> None:
    roster = open_roster(Nodes({1: _says(_site("north")), 2: _says(_site("north"))}))
    roster.gather(1, 60.0)
    assert roster.participants["north"].node == 1
    assert roster.absent == {"north (node 2)": "duplicate"}


def test_a_registered_site_may_come_back_behind_another_node(open_roster: Callable[..., Roster]) -> None:
    grid = Nodes({1: _says(_site("north"))}, {1: "north", 7: "north"})
    roster = open_roster(grid)
    roster.gather(1, 60.0)
    grid.answers = {7: _says(_site("north"))}
    for _ in range(2):
        roster.refresh(0.0)
    assert roster.participants["north"].node == 7


def test_a_site_that_waits_for_approval_is_asked_again_and_joins(open_roster: Callable[..., Roster]) -> None:
    waiting = _site("south", PlanStatus.WAITING)
    grid = Nodes({1: _says(_site("north")), 2: _says(waiting, waiting, _site("south"))})
    roster = open_roster(grid)
    roster.gather(1, 60.0)
    assert set(roster.participants) == {"north"} and roster.absent == {"south": "waiting"}
    for _ in range(4):
        roster.refresh(0.0)
    assert set(roster.participants) == {"north", "south"} and roster.absent == {}
    assert grid.asked.count(1) == 1


def test_a_site_that_refused_is_not_asked_again(open_roster: Callable[..., Roster]) -> None:
    grid = Nodes({1: _says(_site("north")), 2: _says(_site("south", PlanStatus.REFUSED, RefusalReason.BUDGET))})
    roster = open_roster(grid)
    roster.gather(1, 60.0)
    for _ in range(3):
        roster.refresh(0.0)
    assert roster.absent == {"south": "budget"} and grid.asked.count(2) == 1


def test_a_node_that_does_not_take_part_is_asked_less_and_less_often(
    open_roster: Callable[..., Roster], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr("server.roster.time.monotonic", lambda: clock)
    grid = Nodes({1: wire.unavailable_record})
    roster = open_roster(grid)
    monkeypatch.setattr(roster_module, "ASK_AGAIN_SECONDS", (5.0, 20.0))
    asked_at = []
    for second in range(100):
        clock = float(second)
        roster.refresh(0.0)
        if roster._questions:
            asked_at.append(second)
    assert asked_at == [0, 5, 15, 35, 55, 75, 95]


def test_too_few_sites_end_the_run_with_the_reason_of_each(open_roster: Callable[..., Roster]) -> None:
    names = {1: "north", 2: "south", 3: "west"}
    garbage = RecordDict()
    roster = open_roster(Nodes({1: wire.unavailable_record, 2: lambda: None, 3: lambda: garbage}, names))
    with pytest.raises(
        RunFailed, match=r"min_sites = 2: only 0 .*\(north: node-error, south: late, west: unreadable\)"
    ):
        roster.gather(2, 0.2)


def test_who_follows_the_folder_is_told_what_the_run_waits_for(
    open_roster: Callable[..., Roster], tmp_path: Path
) -> None:
    roster = open_roster(Nodes({1: wire.unavailable_record}, {1: "north"}))
    with pytest.raises(RunFailed):
        roster.gather(1, 0.2)
    assert RunFolder(tmp_path).waiting() == "0 of 1 sites are ready; north: node-error"
    open_roster(Nodes({1: _says(_site("north"))})).gather(1, 60.0)
    assert RunFolder(tmp_path).waiting() == ""


def test_after_a_resumption_the_sites_of_before_are_known_and_waited_for(open_roster: Callable[..., Roster]) -> None:
    before = open_roster(Nodes({1: _says(_site("north")), 2: _says(_site("south"))}))
    before.gather(2, 60.0)
    late = iter([None, None, None, wire.description_to_record(_site("south"))])
    after = open_roster(Nodes({5: _says(_site("north")), 6: lambda: next(late)}))
    assert after.described == before.described == {"north": _site("north"), "south": _site("south")}
    after.gather(1, 60.0)
    assert {site: one.node for site, one in after.participants.items()} == {"north": 5, "south": 6}


def test_a_site_of_before_that_does_not_come_back_is_waited_for_only_so_long(
    open_roster: Callable[..., Roster], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_roster(Nodes({1: _says(_site("north")), 2: _says(_site("south"))})).gather(2, 60.0)
    monkeypatch.setattr(roster_module, "SETTLE_SECONDS", 0.05)
    after = open_roster(Nodes({1: _says(_site("north"))}))
    after.gather(1, 60.0)
    assert set(after.participants) == {"north"} and set(after.described) == {"north", "south"}


def test_a_site_may_describe_itself_anew(open_roster: Callable[..., Roster], tmp_path: Path) -> None:
    larger = replace(_site("north"), public_size=200)
    open_roster(Nodes({1: _says(_site("north"))})).gather(1, 60.0)
    open_roster(Nodes({1: _says(larger)})).gather(1, 60.0)
    assert RunFolder(tmp_path).sites()["north"]["public_size"] == 200


@pytest.mark.parametrize(
    "changes", [{"steps": 4}, {"sample_rate": 0.5}, {"clip_norm": 2.0}, {"noise_multiplier": 50.0}, {"name": "lora"}]
)
def test_a_site_that_states_other_terms_than_the_plans_is_left_out(
    open_roster: Callable[..., Roster], changes: dict[str, object]
) -> None:
    other = replace(STATEMENT, phases=(replace(STATEMENT.phases[0], **changes),))  # type: ignore[arg-type]
    grid = Nodes({1: _says(_site("north")), 2: _says(replace(_site("south"), privacy=other), _site("south"))})
    roster = open_roster(grid)
    roster.gather(1, 60.0)
    assert set(roster.participants) == {"north"} and roster.absent == {"south": "foreign"}
    for _ in range(2):
        roster.refresh(0.0)
    assert set(roster.participants) == {"north", "south"} and roster.absent == {}
