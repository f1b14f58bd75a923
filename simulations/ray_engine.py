"""``simulation.engine = "ray"``: the same round loop and the same sites, spread over actors of a Ray cluster.

Each actor holds one base model and serves its own share of the sites, so that a site's ledger is open in one process at
a time and what is cached for it is cached once. An actor that dies is replaced, and what it was working on is done
again: the round's reservation and its secret are in the site's folder, so the same release comes of it and nothing is
charged twice. Where a node is gone with it, the remaining actors take over its sites.

What is Flower's: the actor, the way of a message through it (:mod:`simulations.ray_sites`), and how many actors fit
into a cluster. Its actor pools are not used: they give a message to any idle actor, and put one that has died back
among the idle ones, where it is the next to be chosen; after one death every further message fails.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from flwr.app import Message
from ray.exceptions import RayError, RayTaskError

from common.config import RunConfig
from common.errors import RunFailed
from common.plan import Plan
from server.settings import absolute
from simulations.federation import Arm, Federation
from simulations.grid import SimulatedGrid
from simulations.ray_actors import LOOK_SECONDS, DiedEarly, Employer, Hired, NoRoom, dealt_out, first_line
from simulations.ray_sites import Assignment, Footing, Served

log = logging.getLogger(__name__)

AHEAD = 2
"""Messages that an actor has at once: one that it works on, and one that it finds when it is done."""
DEATHS = 3
"""Over one message so many actors may die; then the run fails."""


@dataclass
class Task:
    """A message to a site, until its reply is there."""

    message: Message
    site: str
    deaths: int = 0

    @property
    def seconds_left(self) -> float:
        """How long the reply is still waited for."""
        metadata = self.message.metadata
        return float(metadata.created_at + metadata.ttl - time.time())


@dataclass(eq=False)
class Post:
    """A place for an actor, and what is to be done there."""

    actor: Hired
    waiting: deque[Task] = field(default_factory=deque)
    running: dict[Any, Task] = field(default_factory=dict)
    """Ray's reference to the reply → task, in the order in which the actor works."""

    def feed(self) -> None:
        """Hands the actor what it may have at once."""
        while self.waiting and len(self.running) < AHEAD:
            task = self.waiting.popleft()
            if task.seconds_left > 0:
                self.running[self.actor.handle.serve.remote(task.message, task.site)] = task

    def take_back(self) -> list[Task]:
        """All that was not finished, in order."""
        tasks = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        return tasks


class RayEngine:
    """Actors that have a federation loaded; arms are run on them one after the other. A context manager.

    Args:
        federation: the driver's own.
        folder: of the run. All hosts must have it, for the sites' ledgers.

    Raises:
        ConsiliumError: on entering, if the cluster has no room, or what the actors have loaded does not fit.
    """

    def __init__(self, config: RunConfig, federation: Federation, folder: Path) -> None:
        self.posts: list[Post] = []
        self._sizes = {site: federation.public_size(site) for site in federation.parts}
        self._employer = Employer(absolute(config), folder.resolve(), Footing.of(federation))
        self._home: dict[str, Post] = {}
        """Site → the post that serves it."""
        self._tasks: dict[str, Task] = {}
        """Message id → what is not done yet and still waited for."""
        self._replies: dict[str, Message] = {}

    def __enter__(self) -> RayEngine:
        count = min(self._employer.wanted(), len(self._sizes))
        self.posts += map(Post, self._employer.hire(count))
        for post, share in zip(self.posts, dealt_out(self._sizes, count), strict=True):
            self._home.update(dict.fromkeys(share, post))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the actors, in whatever they are doing."""
        for post in self.posts:
            ray.kill(post.actor.handle)
        self.posts.clear()

    @contextmanager
    def grid(self, arm: Arm, plan: Plan, coordinator: str) -> Iterator[RayGrid]:
        """The grid of an arm, whose sites' ledgers are open as long as this lasts."""
        self._assignment = Assignment(replace(arm, folder=arm.folder.resolve()), plan, coordinator)
        self._open([post.actor for post in self.posts])
        try:
            yield RayGrid(arm.sites, self)
            for post in self.posts:
                with suppress(RayError):  # what matters is on the disk
                    ray.get(post.actor.handle.close.remote())
        finally:
            for post in self.posts:
                post.take_back()
            self._tasks.clear()
            self._replies.clear()

    def _open(self, actors: Sequence[Hired]) -> None:
        try:
            ray.get([actor.handle.open.remote(self._assignment) for actor in actors])
        except RayError as error:
            raise DiedEarly(
                f"simulation.engine = 'ray': an actor failed before its first message ({first_line(error)}); --resume"
            ) from None

    # ---- messages ---------------------------------------------------------------------------------------------------

    def submit(self, message: Message, site: str) -> None:
        """Sends a message on its way to a site."""
        task = self._tasks[message.metadata.message_id] = Task(message, site)
        post = self._home[site]
        post.waiting.append(task)
        post.feed()

    def reply(self, wanted: Iterable[str]) -> Message | None:
        """The reply to the first of these messages, once it is there; ``None`` if they have all expired.

        In the order of the messages, whichever site is faster, so that a run does not depend on that.

        Raises:
            RunFailed: a site failed, or its message is the end of every actor.
        """
        for identity in wanted:
            while identity not in self._replies and identity in self._tasks:
                if (seconds := self._tasks[identity].seconds_left) <= 0:
                    del self._tasks[identity]  # its reply will be dropped when it comes
                    break
                running = [reference for post in self.posts for reference in post.running]
                for reference in ray.wait(running, timeout=seconds)[0]:
                    self._collect(next(post for post in self.posts if reference in post.running))
            if identity in self._replies:
                return self._replies.pop(identity)
        return None

    def _collect(self, post: Post) -> None:
        """Takes up what an actor got first: it works in order, so that is done, or is what the actor died over."""
        reference, task = next(iter(post.running.items()))
        try:
            served: Served = ray.get(reference)
        except RayTaskError as error:
            log.info("site '%s': %s", task.site, error)
            raise RunFailed(f"site '{task.site}': {_said(error)}; mend the cause, then --resume") from None
        except RayError as error:
            self._replace(post, first_line(error))
            return
        del post.running[reference]
        post.feed()
        for record in served.logged:
            logging.getLogger(record.name).handle(record)
        identity = task.message.metadata.message_id
        if self._tasks.get(identity) is task:  # else it came too late
            del self._tasks[identity]
            self._replies[identity] = served.reply

    # ---- deaths -----------------------------------------------------------------------------------------------------

    def _replace(self, post: Post, why: str) -> None:
        """Gives the work of an actor that died to another one."""
        tasks = post.take_back()
        tasks[0].deaths += 1  # it works on one at a time
        log.warning("%s died over site '%s' (%s); its sites are served anew", post.actor.who, tasks[0].site, why)
        if tasks[0].deaths >= DEATHS:
            raise RunFailed(
                f"site '{tasks[0].site}': {DEATHS} actors died over it ({why}); each holds a model of its own: lower "
                "simulation.actors or physical_batch, or give the nodes more memory; then --resume"
            )
        ray.kill(post.actor.handle)  # one that is only out of reach would still have the ledgers open
        try:
            post.actor = self._another()
            heirs = [post]
        except NoRoom:
            self.posts.remove(post)
            heirs = self.posts
            log.warning("the other %d actors take over its sites", len(heirs))
        if not heirs:
            raise RunFailed("simulation.engine = 'ray': no node is left that has room for an actor; then --resume")
        self._hand_over(post, tasks, heirs)

    def _another(self) -> Hired:
        """A new actor in the place of one. If it dies too, it may have been started on a node that is going down."""
        for attempt in range(1, DEATHS + 1):
            try:
                actors = self._employer.hire(1, beside=len(self.posts) - 1)
                self._open(actors)
                return actors[0]
            except DiedEarly as error:
                if attempt == DEATHS:
                    raise
                log.warning("%s; another one is tried", error)
                time.sleep(attempt * LOOK_SECONDS)
        raise AssertionError("unreachable")

    def _hand_over(self, post: Post, tasks: Sequence[Task], heirs: Sequence[Post]) -> None:
        own = [site for site, home in self._home.items() if home is post]
        self._home.update(zip(own, cycle(heirs), strict=False))
        for task in tasks:
            self._home[task.site].waiting.append(task)
        for heir in heirs:
            heir.feed()


class RayGrid(SimulatedGrid):
    """Flower's grid, whose nodes are sites in actors; node ids are 1, 2, … in the order of the sites' names."""

    def __init__(self, sites: Iterable[str], engine: RayEngine) -> None:
        super().__init__(sites)
        self.engine = engine

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages on their way; returns their ids."""
        identities = []
        for message in messages:
            self.engine.submit(message, self.names[message.metadata.dst_node_id])
            identities.append(message.metadata.message_id)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply to the first of these messages, once it is there."""
        reply = self.engine.reply(message_ids)
        return [] if reply is None else [reply]


def _said(error: RayTaskError) -> str:
    """What went wrong at a site. Flower puts its own words before the text of an error."""
    return str(getattr(error.cause, "message", error.cause)).rpartition("Message: ")[2].strip()
