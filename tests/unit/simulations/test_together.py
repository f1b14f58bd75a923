"""Which rows share a pass, which sites share a group, and whose answer a fault is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from safetensors.numpy import load_file

import simulations.together.serving as serving
from common import wire
from common.config import RunConfig
from common.errors import LedgerError
from common.examples import Batch
from common.messages import Refusal, RefusalReason, TrainRequest
from common.toml_settings import validate
from server.watcher import Silent
from simulations.grid import InProcessGrid
from simulations.simulate import simulate
from simulations.together.passes import Piece, filled

# ---------------------------------------------------------------------------------------------------- which rows share


def batch(length: int, rows: int, units: Sequence[int]) -> Batch:
    """A physical batch whose first rows belong to these units; examples carry the numbers of their rows."""
    mask, weights = torch.ones(rows, length, dtype=torch.long), torch.zeros(rows)
    return Batch(mask, mask, weights, weights, np.arange(len(units)), np.array(units, np.int64))


def plain(length: int, rows: int, examples: int) -> Batch:
    """The same where each example is a unit of its own."""
    given = batch(length, rows, range(examples))
    return Batch(given.inputs, given.mask, given.targets, given.weights, given.indices)


def told(passes: Sequence[Sequence[Piece]]) -> list[list[tuple[int, list[int]]]]:
    """Site and rows of each piece of each pass."""
    return [[(piece.site, piece.rows.tolist()) for piece in pieces] for pieces in passes]


def test_rows_of_one_length_fill_a_pass_whichever_site_they_are_of() -> None:
    sites = [[plain(16, 4, 3)], [plain(16, 4, 2), plain(32, 4, 1)], [plain(32, 4, 2)]]
    assert told(list(filled(sites))) == [
        [(0, [0, 1, 2]), (1, [0])],
        [(1, [1])],
        [(1, [0]), (2, [0, 1])],
    ]


def test_a_unit_is_in_one_pass_as_a_whole() -> None:
    """One more row would fit into the first pass, but not both rows of the second site's first unit."""
    sites = [[batch(16, 4, [7, 7, 9])], [batch(16, 4, [1, 2, 1])]]
    assert told(list(filled(sites))) == [[(0, [0, 1, 2])], [(1, [0, 2, 1])]]


def test_a_full_batch_stays_as_it_is() -> None:
    sites = [[plain(16, 4, 3)], [plain(16, 4, 4), plain(16, 4, 1)]]
    assert told(list(filled(sites))) == [[(1, [0, 1, 2, 3])], [(0, [0, 1, 2]), (1, [0])]]


def test_sites_without_rows_have_no_part() -> None:
    assert list(filled([[], []])) == []
    assert told(list(filled([[], [plain(16, 2, 1)], []]))) == [[(1, [0])]]


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_lost_no_unit_is_cut_and_no_pass_is_added(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(3, 9))

    def site() -> list[Batch]:
        found = []
        for length in (16, 32, 48):
            for _ in range(generator.integers(0, 4)):
                count = int(generator.integers(1, rows + 1))
                if seed % 2:
                    found.append(plain(length, rows, count))
                else:
                    found.append(batch(length, rows, generator.integers(0, 4, count).tolist()))
        return found

    sites = [site() for _ in range(5)]
    passes = list(filled(sites))
    assert len(passes) <= sum(map(len, sites))
    for pieces in passes:
        assert len({piece.batch.mask.shape for piece in pieces}) == 1
        assert sum(len(piece.rows) for piece in pieces) <= rows
    for number, batches in enumerate(sites):
        for each in batches:
            own = [piece for pieces in passes for piece in pieces if piece.batch is each]
            assert all(piece.site == number for piece in own)
            assert sorted(np.concatenate([piece.rows for piece in own])) == list(range(len(each.indices)))
            if each.units is not None:
                seen = [set(each.units[piece.rows]) for piece in own]
                assert sum(map(len, seen)) == len(set.union(*seen))


# --------------------------------------------------------------------------------------------- which sites, whose fault


class Site:
    """Stands in for ``client.site.Site``; may fail at any of its steps."""

    def __init__(self, name: str, group: str = "one", fails_in: str = "", rank: int = 4) -> None:
        self.name, self.group, self.fails_in = name, group, fails_in
        self.done: list[str] = []

    def answering(self) -> Any:
        return nullcontext()

    def _do(self, step: str) -> None:
        self.done.append(step)
        if step == self.fails_in:
            raise LedgerError(f"{self.name} failed in {step}")

    def begin(self, request: TrainRequest) -> Any:
        self._do("begin")
        if self.fails_in == "refused":
            return Refusal(self.name, RefusalReason.POLICY)
        return Work(self, self.group)

    def trained(self, work: Any) -> tuple[dict[str, Any], dict[str, float]]:
        self._do("alone")
        return {}, {}

    def finish(self, work: Any, update: Any, means: Any) -> str:
        self._do("finish")
        return f"release of {self.name}"


class Work:
    """Of a site of this file."""

    model = SimpleNamespace(lora=SimpleNamespace(dropout=0.0))
    rows = 8

    def __init__(self, site: Site, group: str) -> None:
        self.site, self.digest = site, group


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The sites that were trained together."""
    seen: list[list[str]] = []

    def together(works: Sequence[Work]) -> list[Any]:
        seen.append([work.site.name for work in works])
        if any(work.site.fails_in in ("together", "alone") for work in works):
            raise RuntimeError("a group that cannot be trained")
        return [({}, {})] * len(works)

    monkeypatch.setattr(serving, "Site", Site)
    monkeypatch.setattr(serving, "Work", Work)
    monkeypatch.setattr(serving, "train_together", together)
    return seen


REQUEST = TrainRequest("run", 1, "0" * 64, {}, "0" * 64)


def served(*sites: Site) -> list[Any]:
    return serving.train_sites([(site, REQUEST) for site in sites])  # type: ignore[misc]


def test_only_sites_with_the_same_request_share_a_pass(groups: list[list[str]]) -> None:
    """Sites of another rank, or another plan, have another request digest."""
    served(Site("a"), Site("b", "two"), Site("c"), Site("d", "two"), Site("e", "three"))
    assert groups == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize("step", ["begin", "finish"])
def test_a_fault_of_one_site_is_its_own_answer(groups: list[list[str]], step: str) -> None:
    first, failing, last = served(Site("a"), Site("b", fails_in=step), Site("c"))
    assert (first, last) == ("release of a", "release of c")
    assert isinstance(failing, LedgerError) and f"b failed in {step}" in str(failing)


def test_a_group_that_cannot_be_trained_is_trained_one_by_one(
    groups: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    sites = [Site("a"), Site("b", fails_in="together"), Site("c")]
    assert served(*sites) == ["release of a", "release of b", "release of c"]
    assert all(site.done == ["begin", "alone", "finish"] for site in sites)
    assert "3 sites train one after the other" in caplog.text


def test_a_site_that_fails_alone_too_fails_alone(groups: list[list[str]]) -> None:
    first, failing, last = served(Site("a"), Site("b", fails_in="alone"), Site("c"))
    assert (first, last) == ("release of a", "release of c")
    assert isinstance(failing, LedgerError)


def test_a_site_that_refuses_is_not_trained(groups: list[list[str]]) -> None:
    refusing = Site("b", fails_in="refused")
    replies = served(Site("a"), refusing, Site("c"))
    assert groups == [["a", "c"]]
    assert replies[1] == Refusal("b", RefusalReason.POLICY) and refusing.done == ["begin"]


# ------------------------------------------------------------------------------------------------------------- the grid


class Relayed:
    """A site of the grid that is no ``client.site.Site``, and is asked for itself."""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name, self.fails = name, fails

    def train(self, request: TrainRequest) -> Refusal:
        if self.fails:
            raise LedgerError(f"{self.name} failed")
        return Refusal(self.name, RefusalReason.POLICY)


def pushed(grid: InProcessGrid, kind: str = wire.TRAIN_TYPE) -> list[str]:
    content = wire.train_request_to_record(REQUEST)
    return list(grid.push_messages([grid.create_message(content, kind, node, "run") for node in grid.get_node_ids()]))


def reply_of(content: RecordDict) -> str:
    return wire.train_reply_from_record(content).site  # type: ignore[union-attr]


@contextmanager
def grid_of(count: int, together: int, workers: int, failing: str = "") -> Any:
    sites = {name: Relayed(name, name == failing) for name in "abcdefgh"[:count]}
    order: list[str] = []
    with ThreadPoolExecutor(workers) if workers else nullcontext() as executor:
        yield InProcessGrid(sites, order.append, executor, together), order  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("together", [1, 2, 3, 5, 8])
def test_every_message_gets_its_own_reply_in_the_order_of_the_messages(together: int, workers: int) -> None:
    with grid_of(5, together, workers) as (grid, order):
        identities = pushed(grid)
        replies = [reply for each in identities for reply in grid.pull_messages([each])]
        assert [reply.metadata.reply_to_message_id for reply in replies] == identities
        assert [reply_of(reply.content) for reply in replies] == list("abcde")
        assert sorted(order) == list("abcde")
        assert list(grid.pull_messages(identities)) == []


def test_sites_are_worked_on_in_groups_when_the_first_reply_is_asked_for() -> None:
    with grid_of(5, 2, 0) as (grid, order):
        identities = pushed(grid)
        assert order == []
        grid.pull_messages(identities[2:3])
        assert order == ["c", "d"]


def test_a_fault_is_raised_where_that_sites_reply_is_asked_for() -> None:
    with grid_of(4, 4, 0, failing="b") as (grid, _):
        identities = pushed(grid)
        assert reply_of(next(iter(grid.pull_messages(identities[:1]))).content) == "a"
        with pytest.raises(LedgerError, match="b failed"):
            grid.pull_messages(identities[1:2])
        assert reply_of(next(iter(grid.pull_messages(identities[2:]))).content) == "c"


# -------------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("ranks", [[], [4, 2]], ids=["equal ranks", "unequal ranks"])
def test_a_run_gives_the_same_adapter_however_many_sites_share_a_pass(
    tiny_bert: Path, triage_data: Path, tmp_path: Path, ranks: list[int]
) -> None:
    settings = {
        "model": {"name": str(tiny_bert)},
        "task": {"name": "sequence-classification", "labels": ["urgent", "routine", "review"], "max_length": 32},
        "data": {"path": str(triage_data), "site_column": "hospital"},
        "lora": {"r": 4, "layers": 2},
        "evaluation": {"limit": 4},
        "phase": [
            {"name": "head", "rounds": 1, "sample_rate": 1.0, "train": ["head"]},
            {"name": "lora", "rounds": 2, "steps": 2, "sample_rate": 0.5, "algorithm": "flexlora"},
        ],
    }
    adapters: list[Mapping[str, Any]] = []
    for sites_per_pass in (1, 3):
        more = {"simulation": {"ranks": ranks, "sites_per_pass": sites_per_pass}}
        if ranks:
            more["phase"] = settings["phase"][1:]  # type: ignore[index]
        config = validate(RunConfig, {**settings, **more}, "test")
        out = tmp_path / str(sites_per_pass)
        simulate(config, out, False, lambda title, rounds: nullcontext(Silent()))
        adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    first, second = adapters
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, atol=1e-5 * max(1.0, float(np.abs(array).max())))
