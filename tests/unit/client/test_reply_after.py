"""``policy.reply_after`` hides how long training took from every caller, whatever else it asks meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from small_sites import encoded, plan_for, policy_for, random_state, request_for, shown, site_for

from common.adapted import AdaptedModel
from common.examples import Examples

REPLY_AFTER = 1.0
TRAINING = 0.2


def test_a_description_asked_for_meanwhile_does_not_tell_when_training_ended(
    model: AdaptedModel, tmp_path: Path
) -> None:
    training = threading.Event()

    def slowly() -> Examples:
        training.set()
        time.sleep(TRAINING)
        return Examples(encoded(model, 12), model.task)

    plan = plan_for(model)
    site = site_for(tmp_path, model, slowly, policy_for(model, reply_after=REPLY_AFTER))
    site.describe(shown(plan))
    began = time.monotonic()
    round = threading.Thread(target=site.train, args=(request_for(plan, random_state(model)),))
    round.start()
    assert training.wait(5)
    site.describe(shown(plan))
    assert time.monotonic() - began >= REPLY_AFTER
    round.join()
