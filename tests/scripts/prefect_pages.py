"""Prefect's pages of the deployments and of a run: photographed, and searched for what they must
show."""

from pathlib import Path
from typing import Any

import requests
import yaml
from browser import photograph
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
DEPLOYMENT = "tiny-nft"
PARAMETERS = ("params", "overrides", "run", "runs_dir")  # of the flow `rl-train`
REPORTED = (
    "score/reward_mean",
    "evaluate/ocr_accuracy",
    "The fixed cases",
    "Worst samples",
    "Artifacts:",
)


def shoot_deployments(page: Page, url: str, out: Path) -> None:
    """The page of all deployments has those of prefect.yaml."""
    page.set_viewport_size({"width": 1000, "height": 645})
    page.goto(f"{url}/deployments")
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        page.get_by_role("link", name=deployment["name"], exact=True).wait_for()
    photograph(page).save(out / "prefect-deployments.png", optimize=True)


def shoot_form(page: Page, url: str, out: Path) -> None:
    """The form that starts a training has a field for each of the flow's parameters."""
    (deployment,) = _found(url, "deployments", deployments={"name": {"any_": [DEPLOYMENT]}})
    page.set_viewport_size({"width": 1000, "height": 870})
    page.goto(f"{url}/deployments/deployment/{deployment['id']}/run")
    for name in PARAMETERS:
        page.get_by_text(f"{name} (Optional)", exact=True).wait_for()
    photograph(page).save(out / "prefect-form.png", optimize=True)


def shoot_run(page: Page, url: str, run: str, out: Path) -> None:
    """The run has ended well, with as many tasks as the server knows."""
    flow_run = _flow_run(url, run)
    tasks = _found(url, "task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}})
    page.set_viewport_size({"width": 1200, "height": 570})
    page.goto(f"{url}/runs/flow-run/{flow_run['id']}")
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.get_by_text(f"{len(tasks)} Task runs", exact=True).wait_for()
    photograph(page).save(out / "prefect-run.png", optimize=True)


def shoot_report(page: Page, url: str, run: str, out: Path) -> None:
    """The last round's report has its numbers and picture, and its links can be followed."""
    chosen = {"flow_run_id": {"any_": [_flow_run(url, run)["id"]]}, "type": {"any_": ["markdown"]}}
    report = _found(url, "artifacts", artifacts=chosen, sort="CREATED_DESC")[0]
    page.set_viewport_size({"width": 700, "height": 1850})
    page.goto(f"{url}/artifacts/artifact/{report['id']}")
    for wanted in (report["description"], *REPORTED):
        page.get_by_text(wanted).first.wait_for()
    picture = page.locator("img[src^='data:image/jpeg']")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0, page.url
    links = page.locator(".markdown-renderer__link").evaluate_all(
        "links => links.map(link => link.href)"
    )
    assert links, f"{page.url} must link to MLflow. It has no link."
    for link in links:
        assert requests.get(link, timeout=60).ok, (
            f"{page.url} links to {link}, which does not answer."
        )
    photograph(page).save(out / "prefect-report.png", optimize=True)


def _flow_run(url: str, name: str) -> dict[str, Any]:
    found = _found(url, "flow_runs", flow_runs={"name": {"any_": [name]}})
    assert found, f"{url} must have a flow run named {name}. It has none."
    return found[0]


def _found(url: str, kind: str, **filters: Any) -> list[dict[str, Any]]:
    answer = requests.post(f"{url}/api/{kind}/filter", json=filters, timeout=60)
    answer.raise_for_status()
    return answer.json()
