"""Makes the work pools, the deployments of `prefect.yaml` and the watch over dead runs known to the
server.

`python -m flows.services.deploy`, in the repository's root, with PREFECT_API_URL (or
`prefect.toml`) naming the server. Doing it again changes nothing.
"""

import datetime
import os
import subprocess
import sys

from flows.services.prefect_api import QUIET

if __name__ == "__main__":
    os.environ |= QUIET  # before the import: it starts Prefect's telemetry

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.workers.process import ProcessWorker

POOLS = {"calligrapher-train": 1, "calligrapher-evaluate": 1}  # concurrency limits
CRASH_WATCH = "calligrapher: a run without a heartbeat has crashed"
SILENCE = datetime.timedelta(seconds=100)  # three heartbeats of 30 s


def deploy() -> None:
    """Create or update everything. Raises CalledProcessError when `prefect deploy` fails (it says
    why)."""
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        for name, limit in POOLS.items():
            pool = WorkPoolCreate(
                name=name, type="process", base_job_template=template, concurrency_limit=limit
            )
            client.create_work_pool(pool, overwrite=True)
        watch_for_crashes(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def watch_for_crashes(client: SyncPrefectClient, silence: datetime.timedelta = SILENCE) -> None:
    """The automation that marks a run Crashed when its heartbeats stop before it has ended."""
    for old in client.read_automations_by_name(CRASH_WATCH):
        client.delete_automation(old.id)
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},  # the next heartbeat, or the run's end
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )
    action = ChangeFlowRunState(
        state=StateType.CRASHED, message="No heartbeat: its machine or process died."
    )
    client.create_automation(AutomationCore(name=CRASH_WATCH, trigger=trigger, actions=[action]))


if __name__ == "__main__":
    deploy()
