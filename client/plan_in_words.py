"""A plan as a data-protection officer reads it: what is trained, what leaves the site, and what it costs.

Names and templates in a plan were chosen by the coordinator. Whatever in them could steer a terminal, or pass for a
line of this text, is shown as an escape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from client.privacy.ledger import Balance, Decision, PlanEntry, Population
from common.messages import PhaseStatement, PrivacyStatement
from common.plan import Plan
from common.privacy.in_words import odds_in_words
from common.sections import EXAMPLE, PhaseSection
from common.signing import PLAN, verify

OUTCOME = {
    Decision.WAITING: "waits for a decision",
    Decision.APPROVED: "approved",
    Decision.REFUSED: "refused",
    Decision.CLOSED: "closed",
}


def shown(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """The same in quotes that it cannot leave."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{shown(escaped)}'"


def signer_of(entry: PlanEntry, keys: Sequence[str]) -> str | None:
    """Which of the pinned keys signed the plan."""
    return next((key for key in keys if verify(key, PLAN, entry.digest.encode(), entry.signature)), None)


def in_words(entry: PlanEntry, plan: Plan, population: Population, balance: Balance, signer: str | None) -> str:
    """The whole explanation."""
    return "\n".join(
        [
            *_heading(entry, plan, signer),
            "",
            "What is trained",
            *_indented(_training(plan, population)),
            "",
            "In which steps",
            *_indented(line for phase in plan.phases for line in _phase(phase, entry.statement, population)),
            "",
            "What leaves the site",
            *_indented(_leaving(plan)),
            "",
            "What it costs",
            *_indented([*_promise(entry.statement, plan), *_budget(entry, population, balance)]),
        ]
    )


def as_object(
    entry: PlanEntry, plan: Plan, population: Population, balance: Balance, signer: str | None
) -> dict[str, Any]:
    """The same as one JSON object, with the plan as it was signed."""
    after = balance.after(entry.statement) if _would_reserve(entry) and entry.statement else balance.reserved
    statement = entry.statement
    return {
        "digest": entry.digest,
        "run": entry.run_id,
        "decision": entry.decision,
        "refusal": entry.refusal,
        "received": entry.received_at,
        "decided": entry.decided_at,
        "closed_because": entry.closed_because or None,
        "signed_by": signer,
        "plan": plan.model_dump(mode="json"),
        "epsilon": statement.epsilon if statement else None,
        "delta": statement.delta if statement else None,
        "phases": [vars(phase) for phase in statement.phases] if statement else [],
        "population": vars(population),
        "budget": {
            "limit": balance.limit,
            "delta": balance.delta,
            "spent": balance.spent,
            "reserved": balance.reserved,
            "reserved_after": after,
            "left_after": max(0.0, balance.limit - after),
            "fits": after <= balance.limit,
        },
    }


def _heading(entry: PlanEntry, plan: Plan, signer: str | None) -> Iterator[str]:
    yield f"Plan {entry.digest}"
    yield f"of run {quoted(plan.run_id)}, received {entry.received_at}"
    detail = f" ({shown(entry.closed_because or entry.refusal or '')})" if entry.refusal else ""
    yield f"It is {OUTCOME[entry.decision]}{detail}." if entry.decision is not Decision.WAITING else "It waits for you."
    yield (
        f"It is signed by the coordinator's key {signer}."
        if signer
        else ("IT IS NOT SIGNED by any key that site.toml names now (policy.coordinator_keys).")
    )


def _training(plan: Plan, population: Population) -> Iterator[str]:
    if plan.task.name == "sequence-classification":
        names = ", ".join(map(quoted, plan.task.labels))
        yield f"Task: to sort texts into {len(plan.task.labels)} classes: {names}."
    else:
        yield f"Task: {shown(plan.task.name)}, to continue a prompt of the form {quoted(plan.task.prompt_template)}."
    yield f"Data: the site's data set {quoted(plan.data)}, texts cut to {plan.task.max_length} tokens."
    declared = f"declared to have {population.public_size} {population.unit}s"
    yield f"      It belongs to population '{population.name}', {declared}."
    yield f"Base model: the one with weight digest {plan.model_digest}. It stays as it is."
    where = ", ".join(map(shown, plan.lora.target_modules)) or "query and value of the attention"
    layers = f" of the top {plan.lora.layers} layers" if plan.lora.layers else " of all layers"
    rank = f"{plan.lora.r}" if plan.rank_at(1) == plan.lora.r else f"up to {plan.lora.r}, here policy.max_rank at most,"
    yield f"Adapter: LoRA of rank {rank} (alpha {plan.lora.alpha:g}) on {where}{layers}."
    if plan.task.maps_features:
        yield (
            f"Head: on {plan.task.feature_rank} coordinates of the top {plan.task.feature_levels} levels, "
            "by a map that the coordinator sends."
        )


def _phase(phase: PhaseSection, statement: PrivacyStatement | None, population: Population) -> Iterator[str]:
    what = " and ".join({"head": "the classification head", "lora": "the LoRA adapter"}[part] for part in phase.train)
    rounds, steps = _times(phase.rounds, "round"), _times(phase.steps, "step")
    yield f"Phase '{phase.name}' trains {what}: {rounds} of {steps} each."
    stated = {each.name: each for each in statement.phases}.get(phase.name) if statement else None
    if stated is not None:
        yield f"  {_sampling(stated, population)}"
        yield f"  {_noise(stated, population)}"


def _sampling(stated: PhaseStatement, population: Population) -> str:
    if stated.sample_rate == 1:
        return f"Every {population.unit} takes part in every step."
    about = stated.sample_rate * population.public_size
    return (
        f"Each {population.unit} takes part in a step with probability {stated.sample_rate:.4g}, by chance alone: "
        f"about {about:.3g} of {population.public_size}."
    )


def _noise(stated: PhaseStatement, population: Population) -> str:
    if not stated.noise_multiplier:
        return "NO NOISE is added."
    return (
        f"What one {population.unit} contributes is cut to norm {stated.clip_norm:g}; the noise in each step is "
        f"{stated.noise_multiplier:.4g} times that (noise multiplier)."
    )


def _leaving(plan: Plan) -> Iterator[str]:
    releases = _times(plan.rounds, "release")
    if plan.wire.up != "fp32":
        yield f"Numbers leave rounded to {plan.wire.up}."
    if plan.privacy.metrics:
        yield f"At most {releases}, one in each round: the change of the adapter's numbers, and with it, with noise and"
        yield f"within the same epsilon, the mean over the round's examples of: {', '.join(plan.privacy.metrics)}."
        yield "Nothing else: no text, no row, no count of rows."
    else:
        yield f"At most {releases}, one in each round: the change of the adapter's numbers, and nothing else."
        yield "No text, no row, no loss, no count of rows."


def _promise(statement: PrivacyStatement | None, plan: Plan) -> Iterator[str]:
    if statement is None:
        yield "Nothing was calculated, because the site's policy refused the plan."
    elif statement.epsilon is None or statement.delta is None:
        yield "THE PLAN PROMISES NO PRIVACY: what leaves can tell what single rows say."
    else:
        yield (
            f"This plan: epsilon {statement.epsilon:.4f} at delta {statement.delta:g} for each {statement.unit}, "
            f"by the accountant {statement.accountant.upper()}, with {plan.privacy.noise} noise."
        )
        yield "It covers all rounds, whether they are executed or not; nothing is given back."
        if plan.privacy.unit != EXAMPLE:
            yield f"At most {plan.privacy.max_examples_per_unit} rows of one {statement.unit} count in a step."
        yield odds_in_words(statement.epsilon, statement.delta, statement.unit)


def _budget(entry: PlanEntry, population: Population, balance: Balance) -> Iterator[str]:
    yield f"Lifetime budget of population '{population.name}' (epsilon at delta {balance.delta:g}, all plans ever):"
    yield f"  limit                {balance.limit:>10.4f}"
    if not _would_reserve(entry):
        yield f"  reserved             {balance.reserved:>10.4f}"
        yield f"    of that executed   {balance.spent:>10.4f}"
        yield f"  left                 {balance.left:>10.4f}"
        return
    assert entry.statement is not None
    after = balance.after(entry.statement)
    yield f"  reserved before      {balance.reserved:>10.4f}"
    yield f"  reserved if approved {after:>10.4f}"
    yield f"  left then            {max(0.0, balance.limit - after):>10.4f}"
    if after > balance.limit:
        yield "  THE PLAN DOES NOT FIT: to approve it is to refuse it."
    yield "These figures stay true though later plans are chosen after seeing what left before. So they are larger than"
    yield "a plan's own epsilon, and do not add up."


def _would_reserve(entry: PlanEntry) -> bool:
    return entry.decision is Decision.WAITING and entry.statement is not None


def _times(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _indented(lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
