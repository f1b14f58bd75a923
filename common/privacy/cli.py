"""``consilium privacy``: what noise buys which privacy, before anybody trains anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from common.errors import ConfigError
from common.privacy.in_words import odds_factor

app = typer.Typer(help="Plan and explain differential privacy.", no_args_is_help=True)

_PLAN_PARAGRAPHS = (
    "What a noise multiplier costs in epsilon, or which noise multiplier meets an epsilon.",
    "Each round takes S noisy steps; in each, every example joins with probability B/N (Poisson sampling). The "
    "neighbouring data set has one example more or less, and every step of every round is counted.",
    "The stated epsilon is the upper bound of the PRV accountant; the figure of a second library (PLD) and the Rényi "
    "bound stand beside it.",
    "Examples:",
    "  consilium privacy plan --examples 4000 --batch 100 --rounds 40 --steps 1 --epsilon 3",
    "  consilium privacy plan --examples 4000 --batch 100 --rounds 40 --steps 1 --noise-multiplier 1.0 --json",
    "  consilium privacy plan --examples 500 --batch 500 --rounds 40 --steps 1 --epsilon 8 --delta 1e-6",
)


@dataclass(frozen=True)
class PlanFigures:
    """One line of planning; also the JSON object that ``--json`` prints."""

    examples: int
    batch: int
    sample_rate: float
    rounds: int
    steps_per_round: int
    steps: int
    delta: float
    noise_multiplier: float
    epsilon: float
    pld_epsilon: float
    rdp_epsilon: float
    accountant: str = "prv"
    unit: str = "example"


@app.callback()
def privacy() -> None:
    """Plan and explain differential privacy."""


@app.command(help="\n\n".join(_PLAN_PARAGRAPHS))
def plan(
    examples: Annotated[int, typer.Option(help="Number N of private examples at one site.")],
    batch: Annotated[int, typer.Option(help="Expected number B of examples in a step; all of them if B = N.")],
    rounds: Annotated[int, typer.Option(help="Number of rounds, all of which the site takes part in.")],
    steps: Annotated[int, typer.Option(help="Local steps in a round.")],
    epsilon: Annotated[float | None, typer.Option(help="Target: find the noise multiplier that meets it.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise in units of the clip norm: find the epsilon it costs.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Default: the largest power of ten not above 1/(10 N), at most 1e-5.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    _check(examples, batch, rounds, steps, epsilon, noise_multiplier)
    figures = _figures(examples, batch, rounds, steps, epsilon, noise_multiplier, delta)
    if as_json:
        typer.echo(json.dumps(asdict(figures)))
    else:
        _print(figures)


def _check(
    examples: int, batch: int, rounds: int, steps: int, epsilon: float | None, noise_multiplier: float | None
) -> None:
    counts = {"--examples": examples, "--batch": batch, "--rounds": rounds, "--steps": steps}
    problems = [f"{name} {value} must be at least 1" for name, value in counts.items() if value < 1]
    if batch > examples >= 1:
        problems.append(f"--batch {batch} exceeds --examples {examples}: a step cannot expect more examples than exist")
    if epsilon is None and noise_multiplier is None:
        problems.append("give --epsilon E to find the noise, or --noise-multiplier Z to find the epsilon")
    if epsilon is not None and noise_multiplier is not None:
        problems.append(
            f"--epsilon {epsilon:g} and --noise-multiplier {noise_multiplier:g} determine each other: give one of them"
        )
    if problems:
        raise ConfigError(problems, source="consilium privacy plan")


def _figures(
    examples: int,
    batch: int,
    rounds: int,
    steps: int,
    epsilon: float | None,
    noise_multiplier: float | None,
    delta: float | None,
) -> PlanFigures:
    from common.privacy import accounting  # heavy: after the input was checked, and not for --help

    rate, total = batch / examples, rounds * steps
    delta = accounting.default_delta(examples) if delta is None else delta
    if noise_multiplier is None:
        assert epsilon is not None, "checked above"
        (noise_multiplier,) = accounting.calibrate([accounting.PhaseLoad(rate, total, share=1.0)], epsilon, delta)
    segments = [accounting.Segment(rate, noise_multiplier, total)]
    return PlanFigures(
        examples=examples,
        batch=batch,
        sample_rate=rate,
        rounds=rounds,
        steps_per_round=steps,
        steps=total,
        delta=delta,
        noise_multiplier=noise_multiplier,
        epsilon=accounting.epsilon(segments, delta),
        pld_epsilon=accounting.pld_epsilon(segments, delta),
        rdp_epsilon=accounting.rdp_epsilon(segments, delta),
    )


def _print(figures: PlanFigures) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_row("noise multiplier", f"{figures.noise_multiplier:.4f}")
    table.add_row("epsilon (PRV, the stated figure)", f"{figures.epsilon:.4f}", style="bold")
    table.add_row("epsilon (PLD, second library)", f"{figures.pld_epsilon:.4f}")
    table.add_row("epsilon (Rényi bound)", f"{figures.rdp_epsilon:.4f}")
    table.add_row("delta", f"{figures.delta:g}")
    table.add_row("sample rate", f"{figures.sample_rate:.6g}")
    table.add_row("steps", f"{figures.rounds} x {figures.steps_per_round} = {figures.steps}")
    console = Console()
    console.print(table)
    factor = odds_factor(figures.epsilon)
    console.print(
        f"Whoever sees all {figures.rounds} releases of the site can raise or lower the odds that any one example was "
        f"in its data by a factor of {factor} at most, except with probability {figures.delta:g}.",
        highlight=False,
    )
