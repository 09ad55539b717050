"""The stages as Prefect flows: one thin module a stage.

Importing the package settles where Prefect keeps its state and what it says, before anything imports Prefect. What
the environment already sets wins.
"""

import logging
import os
import time
from pathlib import Path

STARTED = time.perf_counter()  # of the stage's process, but for the interpreter itself
ROOT = Path(__file__).resolve().parents[1]

SETTINGS = {
    "PREFECT_HOME": str(ROOT / ".prefect"),
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # a bare `dvc repro` on busy cores
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "mip",  # the library's lines appear on the run's page
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

# On the terminal Prefect's lines would bury the one line that an error ends with. A run's own go to its page alone;
# those of the service that sends events, which complains when a process ends before the server answers, go nowhere.
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).propagate = False
for _name in ("EventsWorker", "prefect.events.utilities", "prefect._internal.concurrency"):
    logging.getLogger(_name).addFilter(lambda _: False)  # a level or a handler would not outlast Prefect's set-up
