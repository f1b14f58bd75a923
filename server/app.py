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
from common.config import RunConfig
from common.errors import ConsiliumError, OutputError, RunFailed
from common.logs import LogFormat, set_up_logging
from common.toml_settings import validate
from server.checkpoint import RunFolder, to_json, write_atomically
from server.judgement import judge
from server.lock import RunLock
from server.mailbox import GARBLED
from server.prepare import prepare
from server.report import finish, manifest
from server.rounds import Coordinator
from server.settings import Submission, resolved_toml, signing_key

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the submitted plan to its end."""
    set_up_logging(LogFormat.TEXT, verbose=True)
    submission = Submission.from_json(str(context.run_config[wire.RUN_CONFIG]))
    out = Path(submission.out)
    with RunLock(out).hold(context.run_id):
        if (out / "summary.json").is_file():
            return  # waited for another coordinator, which has finished the run
        try:
            coordinate(grid, submission)
        except ConsiliumError as error:
            _report(out, error)
            raise
        except Exception as error:
            _report(
                out,
                RunFailed(
                    f"the coordinator stopped at an unexpected error ({type(error).__name__}: {error}); "
                    f"'flwr log {context.run_id}' has the details, --resume {out} continues the run"
                ),
            )
            raise


def coordinate(grid: Grid, submission: Submission) -> None:
    """Prepares, runs and finishes one submission."""
    config = validate(RunConfig, json.loads(submission.config), "the submitted settings")
    out = Path(submission.out)
    key = signing_key(config)
    prepared = prepare(config, submission.run_id)
    if submission.resume:
        folder = RunFolder(out)
        if folder.manifest()["plan_digest"] != prepared.plan.digest():
            raise OutputError(
                f"--resume {out}: the run was started with other settings, another model or another version, and a "
                "plan that sites have agreed to cannot be changed; put it back, or start a new run with --out"
            )
    else:
        folder = RunFolder.create(
            out, resolved_toml(prepared.config), manifest(prepared, submission.run_id, "deployment")
        )
    coordinator = Coordinator(
        grid, config, prepared.plan, prepared.model, prepared.evaluator, folder, key, garbled=GARBLED
    )
    result = coordinator.run(prepared.initial)
    finish(prepared, submission.run_id, folder, result, judge(prepared, result))


def _report(out: Path, error: ConsiliumError) -> None:
    write_atomically(out / "error.json", to_json({"message": str(error), "exit_code": error.exit_code}))
