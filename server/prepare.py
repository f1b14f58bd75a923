"""From settings to what the round loop needs: resident model, plan, initial adapter, evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.algorithms import LOCAL_RULES
from common.code import code_digest
from common.config import RunConfig
from common.data.read import is_file
from common.errors import ConfigError
from common.examples import Examples
from common.model import BaseModel, Placement, layer_stack, load_base, locate
from common.plan import Plan, plan_of
from common.requests import starts_orthonormal
from common.sections import TaskSection
from common.tasks.registry import task_of
from server.aggregation.registry import aggregator_for
from server.evaluation import ROWS, Evaluator, HeldOut, held_out, test_exists
from server.feature_map import fitted
from server.rounds import VALIDATION
from server.selection import Selection

TEST = "test"


def resident_model(config: RunConfig, placement: Placement | None = None) -> AdaptedModel:
    """Loads the base model once and attaches the run's adapter.

    Args:
        placement: where it runs; empty: as ``[simulation]`` says, whose sites use the same model.

    Raises:
        ModelError: the model does not fit the settings.
    """
    task, simulation = task_of(config.task), config.simulation
    if placement is None:
        placement = Placement.choose(simulation.device, simulation.dtype, simulation.gradient_checkpointing)
    base: BaseModel = load_base(locate(config.model.name, config.model.revision), task, placement, config.task.pooling)
    return AdaptedModel(base, task_of(with_feature_map(config, base)), config.lora)


def with_feature_map(config: RunConfig, base: BaseModel) -> TaskSection:
    """The task's settings with ``feature_map = "auto"`` and an empty ``feature_rank`` decided."""
    settings, task = config.task, task_of(config.task)
    rank = settings.feature_rank or (192 if config.privacy.mechanism == "none" else 128)
    decided = settings.feature_map
    if decided == "auto":
        layers = len(layer_stack(base.encoder) or ())
        fits = layers > settings.feature_levels and int(base.network.config.hidden_size) > rank
        usual = task.selects_pooling and base.pooling != "model" and not config.phase
        decided = "held-out-texts" if fits and usual else "none"
    return settings.model_copy(update={"feature_map": decided, "feature_rank": rank})


def initial_adapter(config: RunConfig, model: AdaptedModel, texts: Examples) -> AdapterState:
    """The adapter before round 1, from the public seed, the label names and the server's own texts alone.

    Args:
        texts: held out by the server; their labels are not looked at.

    Raises:
        ConfigError: the phases' algorithms start A differently.
    """
    starts = {LOCAL_RULES[phase.algorithm].orthonormal_a: phase for phase in config.phases if "lora" in phase.train}
    if len(starts) > 1:
        names = [f"'{phase.algorithm}' (phase '{phase.name}')" for phase in starts.values()]
        raise ConfigError(
            f"phase.algorithm: {names[0]} and {names[1]} start A differently and cannot be mixed in one run; "
            "give all phases that train 'lora' algorithms of one kind"
        )
    feature_map = None
    if model.maps_features:
        assert config.task.feature_rank is not None
        feature_map = fitted(texts.frozen_features(model, ROWS).numpy(), config.task.feature_rank)
    return model.initial_state(config.run.seed, starts_orthonormal(config.phases), feature_map)


def splits(config: RunConfig, model: AdaptedModel) -> dict[str, HeldOut]:
    """The server's own validation split, and its test split where there is one.

    Raises:
        ConfigError: no path is set.
        DataError: the validation split is missing or wrong.
    """
    evaluation = config.evaluation
    source = evaluation.path or config.data.path
    if source is None:
        raise ConfigError("evaluation.path: is missing; give the folder of the server's own held-out data")
    columns: Mapping[str, str] = config.data.columns if evaluation.columns is None else evaluation.columns
    unit = config.data.privacy_unit if evaluation.path is None and is_file(source) else None
    site = config.data.site_column
    found = {VALIDATION: held_out(model, source, evaluation.validation, columns, evaluation.limit, unit, site)}
    if evaluation.test and test_exists(source, evaluation.test):
        found[TEST] = held_out(model, source, evaluation.test, columns, evaluation.limit, unit, site)
    return found


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first round."""

    config: RunConfig
    model: AdaptedModel
    plan: Plan
    initial: AdapterState
    evaluator: Evaluator


def prepare(
    config: RunConfig, run_id: str, model: AdaptedModel | None = None, evaluator: Evaluator | None = None
) -> Prepared:
    """Loads what is not given, and makes the plan.

    Args:
        model: of a simulation; a deployment's is loaded here, and placed as ``[server]`` says.

    Raises:
        ConsiliumError: settings, model or evaluation data do not fit.
    """
    model = model or resident_model(config, Placement.choose(config.server.device, config.server.dtype))
    evaluator = evaluator or Evaluator(
        model, splits(config, model), config.evaluation.metric, config.evaluation.generate
    )
    for phase in config.phases:
        model.trained_in(phase, 1)  # says now if a phase asks for layers that are not there
    config = config.model_copy(update={"task": model.task.settings})
    Selection(evaluator, config.evaluation.selection, config.privacy.mechanism != "none")  # says now if it cannot
    initial = initial_adapter(config, model, evaluator.splits[VALIDATION].examples)
    for phase in config.phases:
        aggregator_for(phase).init(initial)  # says now if settings cannot be combined
    plan = plan_of(config, run_id, model.base.digest, model.spec.digest(), code_digest())
    return Prepared(config, model, plan, initial, evaluator)
