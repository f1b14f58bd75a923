"""What a starting agent writes into the audit log: what a crash kept from it, which bounds changed, that it runs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from client.audit_chain import LONGEST_TEXT, read_entries
from client.audit_log import AuditLog
from client.config import SiteConfig
from client.privacy.ledger import Decision, Ledger
from client.site import Site

TERMS = "terms"
"""The ledger's note of what the settings allowed when an agent last started."""
FOUND = "found in the ledger"
"""Said by a line that a crash kept from being written in its time."""


def announce(site: Site, config: SiteConfig) -> None:
    """Brings the log up to the ledger and the settings, and signs its head."""
    catch_up(site.audit, site.ledger)
    now = _terms(config)
    before = json.loads(site.ledger.note(TERMS) or "null")
    for name in sorted({*before, *now}) if before is not None else ():
        if before.get(name) != now.get(name):
            site.audit.append(
                "policy changed", setting=name, before=_brief(before.get(name)), after=_brief(now.get(name))
            )
    # After the lines: a crash in between repeats them, and never leaves them out.
    site.ledger.remember(TERMS, json.dumps(now))
    terms = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()
    site.audit.append("agent started", code=site.code_digest, terms=terms)
    site.audit.sign_head()


def catch_up(audit: AuditLog, ledger: Ledger) -> None:
    """The ledger is written first and the log after it; where a crash came between, the log is told now."""
    told: dict[str, set[object]] = {"plan received": set(), "plan decided": set(), "plan closed": set()}
    if audit.path.exists():
        with audit.path.open("rb") as stream:
            for line in read_entries(stream):
                if line.event in told:
                    told[line.event].add(line.details.get("plan"))
    for entry in ledger.plans():
        plan = {"run": entry.run_id, "plan": entry.digest}
        if entry.digest not in told["plan received"]:
            audit.append("plan received", **plan, refusal=entry.refusal, by=FOUND)
        if entry.decided_at and entry.digest not in told["plan decided"]:
            audit.append("plan decided", **plan, decision=entry.decision, by=FOUND)
        if entry.decision is Decision.CLOSED and entry.digest not in told["plan closed"]:
            audit.append("plan closed", **plan, why=entry.closed_because[:LONGEST_TEXT], by=FOUND)


def _terms(config: SiteConfig) -> dict[str, Any]:
    """Setting → value of everything that bounds what may leave the site, or who is kept from its data; no paths."""
    tables: dict[str, dict[str, Any]] = {
        "site": config.site.model_dump(mode="json", include={"relay_user", "trust_relay"}),
        "separation": {"key": config.separation.key if config.separation else None},
        "testing": {"fixed_keys": config.testing is not None},
        "policy": config.policy.model_dump(mode="json"),
    }
    tables |= {f"populations.{name}": one.model_dump(mode="json") for name, one in config.populations.items()}
    tables |= {
        f"data.{name}": one.model_dump(mode="json", include={"population", "privacy_unit"})
        for name, one in config.data.items()
    }
    return {f"{section}.{name}": value for section, fields in tables.items() for name, value in fields.items()}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_TEXT else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
