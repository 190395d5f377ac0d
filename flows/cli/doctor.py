"""The command `doctor`: whether this machine can do a run, one line for each thing it needs."""

import argparse
from pathlib import Path

from flows.cli.data import positive
from flows.cli.output import add_json, as_text
from flows.cli.settings import split_settings


def add_doctor_commands(commands: argparse._SubParsersAction) -> None:
    """Add doctor."""
    doctor = commands.add_parser(
        "doctor", help="whether this machine can do a run: versions, GPUs, weights, servers, ranks"
    )
    doctor.add_argument(
        "params", help="a YAML file, as params/nft.yaml, or the name of a shipped one"
    )
    doctor.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="runs_dir= or any dotted key, as for train"
    )
    doctor.add_argument("--ranks", type=positive, help="processes; default: those of the params")
    add_json(doctor)
    doctor.set_defaults(command=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    from tasks.doctor import checks
    from tasks.doctor.on_ranks import on_ranks
    from tasks.params.files import find_params_file
    from tasks.params.run_params import RunParams, load_params

    _, runs_dir, overrides = split_settings(chosen.settings)
    params: RunParams = load_params(find_params_file(chosen.params), overrides)
    size = chosen.ranks or params.launch.size
    needs = ("devices", "weights", "data")
    asked = [
        checks.Check("versions", checks.versions),
        checks.Check("devices", lambda: checks.devices(params, size)),
        checks.Check("weights", lambda: checks.weights(params, runs_dir)),
        checks.Check("data", lambda: checks.data(params, runs_dir)),
        checks.Check("disk", lambda: checks.disk(params, runs_dir)),
        checks.Check("ports", checks.ports),
        checks.Check("rewards", lambda: checks.rewards(params, size)),
        checks.Check("prefect", prefect),
        checks.Check("mlflow", lambda: mlflow(params, runs_dir)),
        checks.Check(
            "ranks",
            lambda: on_ranks(params, runs_dir, size),
            after=needs,
        ),
    ]
    findings = []
    for finding in checks.examine(asked):
        findings.append(finding)
        if not chosen.json:
            print(finding.line(), flush=True)
    if chosen.json:
        print(as_text(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def prefect() -> str:
    """Say which Prefect server a run is shown in."""
    from prefect.settings import PREFECT_API_URL

    from calligrapher.errors import CalligrapherError
    from flows.services.loopback import answers

    url = PREFECT_API_URL.value()
    if not url:
        return "the run starts an API of its own"
    if not answers(f"{url}/health"):
        raise CalligrapherError(
            f"PREFECT_API_URL must name a server that answers. Got {url}, which does not. Start it"
            " (make services), or unset it: the run then starts its own."
        )
    return f"{url} answers"


def mlflow(params, runs_dir: Path) -> str:
    """Say where metrics are mirrored to."""
    from calligrapher.errors import CalligrapherError
    from flows.services.loopback import answers

    tracking = params.tracking
    if "mlflow" not in tracking.used:
        return "not used (tracking.backends, tracking.enabled)"
    if tracking.uri is None:
        return f"the run writes its own store in {runs_dir}"
    if tracking.uri.startswith(("http://", "https://")) and not answers(tracking.uri):
        raise CalligrapherError(
            f"tracking.uri must name an MLflow server that answers. Got {tracking.uri}, which does"
            " not. Start it, or leave the key out: the run then has a store of its own."
        )
    return f"{tracking.uri}"
