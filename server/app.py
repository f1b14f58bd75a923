"""The Flower ServerApp: wiring only. Settings come as one JSON string; the loop is in ``server/rounds.py``.

It writes into the run's folder, which ``consilium server run`` on the same machine follows. An error is written there
too, so that the command can show it and exit as the error says.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common import wire
from common.code import code_digest
from common.config import RunConfig, validate
from common.errors import ConsiliumError, OutputError
from common.logs import LogFormat, set_up_logging
from server.checkpoint import RunFolder, to_json, write_atomically
from server.prepare import TEST, prepare
from server.report import finish, manifest
from server.rounds import Coordinator
from server.settings import Submission, resolved_toml

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the submitted plan to its end."""
    set_up_logging(LogFormat.TEXT, verbose=True)
    submission = Submission.from_json(str(context.run_config[wire.RUN_CONFIG]))
    try:
        coordinate(grid, submission)
    except ConsiliumError as error:
        report = {"message": str(error), "exit_code": error.exit_code}
        write_atomically(Path(submission.out) / "error.json", to_json(report))
        raise


def coordinate(grid: Grid, submission: Submission) -> None:
    """Prepares, runs and finishes one submission."""
    config = validate(RunConfig, json.loads(submission.config), "the submitted settings")
    out = Path(submission.out)
    prepared = prepare(config, submission.run_id)
    if submission.resume:
        folder = RunFolder(out)
        if folder.manifest()["plan_digest"] != prepared.plan.digest():
            raise OutputError(f"--resume {out}: the run was started with other settings or another model")
    else:
        folder = RunFolder.create(out, resolved_toml(config), manifest(prepared, submission.run_id, "deployment"))
    coordinator = Coordinator(grid, config, prepared.plan, prepared.model, prepared.evaluator, folder, code_digest())
    result = coordinator.run(prepared.initial)
    test = prepared.evaluator.evaluate(result.adapter, TEST) if TEST in prepared.evaluator.splits else None
    finish(prepared, submission.run_id, folder, result, test)
