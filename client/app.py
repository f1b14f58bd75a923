"""The Flower ClientApp: a relay between the SuperNode and the site agent, nothing else.

It is shipped by the coordinator and starts anew for every message, so it sees no data and imports neither torch nor
transformers. The agent's address comes from the SuperNode's own ``--node-config``; the coordinator cannot choose it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common import wire
from common.code import code_digest
from common.errors import ConnectionFailed, ConsiliumError
from common.messages import SiteService
from common.rpc import AgentAddress, RemoteSite

app = ClientApp()
log = logging.getLogger(__name__)


def relay_describe(content: RecordDict, site: SiteService) -> RecordDict:
    """One description, with the digest of the code the relay really runs."""
    request = replace(wire.describe_request_from_record(content), code_digest=code_digest())
    return wire.description_to_record(site.describe(request))


def relay_train(content: RecordDict, site: SiteService) -> RecordDict:
    """One round of local training."""
    return wire.train_reply_to_record(site.train(wire.train_request_from_record(content)))


Relay = Callable[[RecordDict, SiteService], RecordDict]
RELAYS: Mapping[str, Relay] = {wire.DESCRIBE_TYPE: relay_describe, wire.TRAIN_TYPE: relay_train}


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """``query.describe``."""
    return _through_agent(relay_describe, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """``train``."""
    return _through_agent(relay_train, message, context)


def _through_agent(relay: Relay, message: Message, context: Context) -> Message:
    """One call to the agent. Flower would send the text of an exception to the coordinator, so none may leave here."""
    try:
        patience = float(context.node_config.get(wire.NODE_AGENT_TIMEOUT, 10.0))
        with RemoteSite(_address(context.node_config), patience) as site:
            content = relay(message.content, site)
    except ConsiliumError as error:
        log.error("no answer from the site agent: %s", error)
        content = wire.unavailable_record()
    except Exception:
        log.exception("no answer from the site agent")  # to the SuperNode's own log, at the site
        content = wire.unavailable_record()
    return Message(content, reply_to=message)


def _address(node_config: Mapping[str, object]) -> AgentAddress:
    target = node_config.get(wire.NODE_AGENT)
    if not isinstance(target, str):
        raise ConnectionFailed(
            "node-config: 'agent' is missing; start flower-supernode with --node-config 'agent=\"unix:PATH\"'"
        )
    files = (node_config.get(key) for key in wire.NODE_CERTIFICATES)
    authority, certificate, key = (Path(file) if isinstance(file, str) else None for file in files)
    return AgentAddress(target, authority, certificate, key)
