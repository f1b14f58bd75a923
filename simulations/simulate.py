"""A whole federation in one process: the real server loop, the real sites, one resident base model.

With ``simulation.compare`` the same data and the same cached features also train each site alone at the same ε, and the
federation without privacy; the test split is looked at once, at the very end, for all of them.
"""

from __future__ import annotations

import resource
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.adapter import AdapterState
from common.config import RunConfig
from server.checkpoint import RunFolder
from server.judgement import Judgement, judge
from server.prepare import TEST
from server.report import finish
from simulations.federation import Arm, Engine, Federation, Trained, Watch
from simulations.ray_cluster import cluster


def simulate(
    config: RunConfig, out: Path, resume: bool, watch: Watch, federation: Federation | None = None
) -> dict[str, Any]:
    """Runs the federation (and, with ``compare``, its comparisons) and writes everything under ``out``.

    Args:
        federation: a resident one of the same model and data, for several runs; ``None``: one of its own.

    Returns:
        The summary, with ``comparison`` and ``test`` figures where there is a test split.

    Raises:
        ConsiliumError: settings, data or folder do not fit.
    """
    folder = RunFolder(out)
    if resume:
        run_id = folder.manifest()["run_id"]
    else:
        folder.refuse_other_run()
        run_id = f"{config.run.name}-{secrets.token_hex(4)}"
    with cluster(config.simulation):
        federation = federation or Federation(config)
        federation.check_count(config.server)
        config = config.model_copy(update={"task": federation.config.task})
        with _engine(config, federation, out) as engine:
            arms = _arms(config, out, tuple(federation.parts))
            ids = [run_id if arm.folder == out else f"{run_id}/{arm.folder.name}" for arm in arms]
            trained = [
                federation.run(arm, identity, resume, watch, engine) for arm, identity in zip(arms, ids, strict=True)
            ]
    main = trained[0]
    judgement = judge(main.prepared, main.result)
    comparison = {"comparison": _comparison(federation, trained, judgement)} if config.simulation.compare else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return finish(main.prepared, run_id, folder, main.result, judgement, {"peak_memory_mib": peak, **comparison})


@contextmanager
def _engine(config: RunConfig, federation: Federation, out: Path) -> Iterator[Engine]:
    """Where the sites are worked on."""
    if config.simulation.engine == "in-process":
        yield federation.in_process
        return
    from simulations.ray_engine import RayEngine  # needs Ray, which is an extra

    with RayEngine(config, federation, out) as engine:
        yield engine.grid


def _arms(config: RunConfig, out: Path, sites: tuple[str, ...]) -> list[Arm]:
    arms = [Arm("federated", out, config, sites)]
    if not config.simulation.compare:
        return arms
    if config.privacy.mechanism != "none":
        arms.append(Arm("federated without privacy", out / "arms" / "no-privacy", config.without_privacy(), sites))
    one = config.server.model_copy(update={"min_sites": 1, "min_replies": 1, "cohort": 1.0})
    alone = config.model_copy(update={"server": one})
    arms += [Arm(f"{site} alone", out / "arms" / f"alone-{site}", alone, (site,)) for site in sites]
    return arms


def _comparison(federation: Federation, trained: list[Trained], judgement: Judgement) -> dict[str, dict[str, Any]]:
    """Base, best single site (chosen on validation), federated with and without privacy: validation and test.

    Args:
        judgement: of the first run.
    """
    evaluator, metric = federation.evaluator, federation.evaluator.metric
    main = trained[0]
    base = main.result.history[0]["metrics"]
    rows: dict[str, dict[str, Any]] = {
        "base": {"validation": base, **_test(federation, main.prepared.initial)},
    }
    singles = [entry for entry in trained if len(entry.arm.sites) == 1 and entry is not main]
    best: Trained | None = None
    for entry in singles:
        if best is None or evaluator.better(_best(entry)[metric], _best(best)[metric]):
            best = entry
    if best is not None:
        rows["best_single_site"] = {"site": best.arm.sites[0], **_on_test(federation, best)}
    rows["federated"] = {"validation": _best(main), **({} if judgement.test is None else {TEST: judgement.test})}
    for entry in trained[1:]:
        if entry.arm.folder.name == "no-privacy":
            rows["federated_without_privacy"] = _on_test(federation, entry)
    return rows


def _best(entry: Trained) -> dict[str, float]:
    record = next(one for one in entry.result.history if one["round"] == entry.result.best_round)
    metrics: dict[str, float] = record["metrics"]
    return metrics


def _on_test(federation: Federation, entry: Trained) -> dict[str, Any]:
    return {"validation": _best(entry), **_test(federation, entry.result.adapter)}


def _test(federation: Federation, adapter: AdapterState) -> dict[str, Any]:
    if TEST not in federation.evaluator.splits:
        return {}
    return {TEST: federation.evaluator.evaluate(adapter, TEST)}
