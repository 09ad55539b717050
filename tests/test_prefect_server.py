"""The pinned packages give a Prefect server that works: with a newer SQLAlchemy it starts and never schedules."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SCRIPT = """
import sys, time
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import CronSchedule

@flow
def tiny():
    pass

with get_client(sync_client=True) as client:
    every_minute = DeploymentScheduleCreate(schedule=CronSchedule(cron="* * * * *"), active=True)
    deployment = client.create_deployment(client.create_flow(tiny), name="tiny", schedules=[every_minute])
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    for _ in range(120):
        runs = client.read_flow_runs(deployment_filter=ours)
        if runs:
            print(len(runs), {run.state.type.value for run in runs})
            sys.exit(0)
        time.sleep(0.5)
sys.exit("no run was scheduled within 60 s")
"""


def test_a_deployment_with_a_schedule_gets_scheduled_runs(engine: Mapping[str, str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=dict(engine), cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert "SCHEDULED" in done.stdout
