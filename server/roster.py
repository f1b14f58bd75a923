"""Who takes part in a run: describes the plan to every node and keeps what the sites behind them answered.

A site is known by its name. Where the coordinator registered a node under a name, only the site of that name may speak
through it; a node without a registered name is believed. Sites that come late, or whose people approve the plan while
the run is going, join between two rounds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flwr.app import RecordDict

from common import wire
from common.errors import RunFailed, WireError
from common.messages import DescribeRequest, PlanStatus, RefusalReason, SiteDescription
from common.plan import Plan
from common.signing import PLAN, SigningKey
from server.admission import Rejection
from server.checkpoint import RunFolder
from server.mailbox import Mailbox
from server.norm_bound import agrees

log = logging.getLogger(__name__)

ASK_AGAIN_SECONDS = (5.0, 60.0)
"""After so long a node that does not take part is asked again; each time twice as long, up to the second figure."""
LOOK_SECONDS = 5.0
"""How often the run looks for new nodes."""
SETTLE_SECONDS = 60.0
"""Once enough sites are ready: how long the others' first answers are waited for. Whoever is later joins later."""
ANSWER_SECONDS = 600.0
"""How long a node may take to describe itself; it may have a round of training to finish first."""

_FIRST_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Participant:
    """A site that takes part, and the Flower node it is behind in this submission."""

    node: int
    description: SiteDescription


class Roster:
    """The sites of one run.

    Attributes:
        participants: sites that are ready, by name.
        absent: sites or nodes that do not take part, with the reason.
        described: every site that ever took part in this run, also before it was resumed, as it described itself.
        heads: the newest signed head of each site's audit log, which it is shown when it is asked again.
    """

    def __init__(self, mailbox: Mailbox, plan: Plan, key: SigningKey, folder: RunFolder) -> None:
        self.mailbox, self.folder, self._plan = mailbox, folder, plan
        self._request = DescribeRequest(
            plan.run_id, plan.canonical(), plan.code_digest, key.sign(PLAN, plan.digest().encode())
        )
        self.heads = folder.heads()
        self.participants: dict[str, Participant] = {}
        self.absent: dict[str, str] = {}
        self.described = {site: _description(entry) for site, entry in folder.sites().items()}
        self._nodes: dict[int, str] = {}
        self._questions: dict[str, int] = {}
        self._next: dict[int, tuple[float, float]] = {}
        self._heard: set[int] = set()
        self._refused: set[int] = set()
        self._looked = -LOOK_SECONDS
        self._when_sampled = False
        self._entries: dict[str, tuple[SiteDescription, dict[str, Any]]] = {}

    @property
    def names(self) -> list[str]:
        """The sites that a cohort may be drawn from."""
        return sorted(self._nodes.values()) if self._when_sampled else list(self.participants)

    def trust(self, minimum: int) -> None:
        """Takes every registered node for a site that will be ready: in a simulation, where each is asked only when it
        is sampled first (:meth:`meet`), so that a run's start does not grow with sites that never are.

        Raises:
            RunFailed: there are fewer.
        """
        self._nodes, self._when_sampled = self.mailbox.nodes(), True
        if len(self._nodes) < minimum:
            raise RunFailed(f"server.min_sites = {minimum}: there are only {len(self._nodes)} sites; lower it")

    def meet(self, cohort: Iterable[str]) -> None:
        """Describes the plan to those of a cohort whom nobody has asked yet. After :meth:`trust`.

        Raises:
            RunFailed: one of them, that was taken for ready, is not.
        """
        nodes = {site: node for node, site in self._nodes.items()}
        strangers = [site for site in cohort if site not in self.participants and site in nodes]
        questions = {nodes[site]: self._question_to(nodes[site]) for site in strangers}
        deadline = time.monotonic() + ANSWER_SECONDS
        for node, reply in self.mailbox.ask(questions, wire.DESCRIBE_TYPE, deadline):
            self._file(node, reply)
        if strangers:
            self._store()
        if not self.participants.keys() >= set(strangers):
            raise RunFailed(f"sites of the round's cohort do not take part ({reasons(self.absent)}); mend the cause")

    def gather(self, minimum: int, timeout: float) -> None:
        """Waits until ``minimum`` sites are ready, and a while for the other nodes to say where they stand.

        Raises:
            RunFailed: too few sites are ready after ``timeout`` seconds.
        """
        started = time.monotonic()
        settle: float | None = None
        while True:
            self.refresh(_FIRST_LOOK_SECONDS)
            now = time.monotonic()
            if len(self.participants) >= minimum:
                settle = settle or now + SETTLE_SECONDS
                if self._all_heard() or now > settle:
                    break
            elif now - started > timeout:
                self._note_silent()
                raise RunFailed(
                    f"server.min_sites = {minimum}: only {len(self.participants)} sites are ready "
                    f"({reasons(self.absent)}); start the missing sites or approve the plan there, then --resume"
                )
            self._show_waiting(minimum)
            time.sleep(self.mailbox.poll_seconds)
        self.folder.store_waiting("")

    def _show_waiting(self, minimum: int) -> None:
        """For whoever follows the folder: what the run waits for, once every node that is online has answered."""
        if self.absent and len(self.participants) < minimum and set(self._nodes) <= self._heard:
            self.folder.store_waiting(f"{len(self.participants)} of {minimum} sites are ready; {reasons(self.absent)}")

    def refresh(self, every: float = LOOK_SECONDS) -> None:
        """Files the answers that have come, and asks the nodes that do not take part; never waits for one.

        Args:
            every: look for new nodes at most so often, in seconds.
        """
        if self._when_sampled:
            return
        known = dict(self.described)
        for node, reply in self.mailbox.received(self._questions):
            self._file(node, reply)
        if self.described != known:
            self._store()
        now = time.monotonic()
        if now - self._looked >= every:
            self._looked = now
            self._nodes = self.mailbox.nodes()
            self._ask(now)

    def _ask(self, now: float) -> None:
        taking_part = {one.node for one in self.participants.values()}
        others = set(self._nodes) - taking_part - self._refused - set(self._questions.values())
        first, most = ASK_AGAIN_SECONDS
        due = {}
        for node in sorted(others):
            at, pause = self._next.get(node, (now, first))
            if now >= at:
                self._next[node] = (now + pause, min(most, 2 * pause))
                due[node] = self._question_to(node)
        if due:
            self._questions.update(self.mailbox.send(due, wire.DESCRIBE_TYPE, ANSWER_SECONDS))

    def _question_to(self, node: int) -> RecordDict:
        """The plan; and to the site of a registered name the newest head of its own log, never another's."""
        witness = self.heads.get(self._nodes.get(node, ""), "")
        return wire.describe_request_to_record(replace(self._request, witness=witness))

    def witness(self, site: str, head: str) -> None:
        """Keeps the head that came with a release, durably."""
        if head:
            self.heads[site] = head
            self.folder.add_head(site, head)

    def _store(self) -> None:
        """Keeps all descriptions, durably; those that were kept before are not taken apart again."""
        for site, one in self.described.items():
            if site not in self._entries or self._entries[site][0] is not one:
                self._entries[site] = (one, asdict(one))
        self.folder.store_sites({site: entry for site, (_, entry) in self._entries.items()})

    def _all_heard(self) -> bool:
        """Every node that is online has answered, and every site of the run before its resumption is back."""
        back = set(self.participants) | {self._nodes.get(node, "") for node in self._refused}
        return set(self._nodes) <= self._heard and set(self.described) <= back

    def _note_silent(self) -> None:
        for node in set(self._nodes) - self._heard:
            self.absent[self._label(node)] = str(Rejection.LATE)

    def _label(self, node: int) -> str:
        return self._nodes.get(node) or f"node-{node}"

    def _file(self, node: int, reply: RecordDict | None) -> None:
        self._heard.add(node)
        label = self._label(node)
        self.absent.pop(label, None)
        if reply is None or wire.is_unavailable(reply):
            self.absent[label] = str(Rejection.NODE_ERROR)
            return
        try:
            description = wire.description_from_record(reply)
        except WireError as error:
            self.absent[label] = str(Rejection.UNREADABLE)
            log.warning("%s: %s", label, error)
            return
        self._enrol(node, description)

    def _enrol(self, node: int, description: SiteDescription) -> None:
        site, registered = description.site, self._nodes.get(node, "")
        if registered and registered != site:
            self.absent[registered] = str(Rejection.WRONG_SITE)
            log.warning("the node registered as '%s' speaks for '%s'; it is left out", registered, site)
        elif self._belongs_to_another(site, node):
            self.absent[f"{site} (node {node})"] = str(Rejection.DUPLICATE)
            log.warning("two nodes call themselves '%s'; the second is left out", site)
        elif description.status is PlanStatus.READY and not agrees(self._plan, description):
            self.absent[site] = str(Rejection.FOREIGN)
            log.warning("'%s' states other steps, rates, clip norms or noise than the plan's; it is left out", site)
        elif description.status is PlanStatus.READY:
            self.absent.pop(site, None)
            self.participants[site] = Participant(node, description)
            self.described[site] = description
        else:
            self.absent[site] = str(description.refusal or description.status)
            if description.status is PlanStatus.REFUSED:
                self._refused.add(node)

    def _belongs_to_another(self, site: str, node: int) -> bool:
        """A site keeps its node while that is online; a node registered for the site may take over afterwards."""
        holder = self.participants.get(site)
        if holder is None or holder.node == node:
            return False
        return holder.node in self._nodes or not self._nodes.get(node)


def reasons(found: Mapping[str, str]) -> str:
    """``site: reason`` of each, in name order."""
    return ", ".join(f"{site}: {reason}" for site, reason in sorted(found.items())) or "no site answered"


def _description(entry: Mapping[str, Any]) -> SiteDescription:
    """The inverse of ``asdict`` and JSON."""
    return SiteDescription(
        **{
            **entry,
            "status": PlanStatus(entry["status"]),
            "refusal": RefusalReason(entry["refusal"]) if entry["refusal"] else None,
            "tasks": tuple(entry["tasks"]),
            "privacy": wire.privacy_from_json(json.dumps(entry["privacy"])) if entry["privacy"] else None,
        }
    )
