"""prefect.yaml: what each deployment asks for in the UI's form."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from flows.prefect_ui import CHECKPOINT_EVENT

DEPLOYMENTS = {
    entry["name"]: entry
    for entry in yaml.safe_load((Path(__file__).parents[3] / "prefect.yaml").read_text())[
        "deployments"
    ]
}


def form(name):
    """The parameters' schema that `prefect deploy` stores: the UI makes the form from it."""
    module, function = DEPLOYMENTS[name]["entrypoint"].rsplit(".", 1)
    return parameter_schema(getattr(import_module(module), function))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_field_of_a_form_is_explained_and_every_preset_is_a_field(name):
    fields = form(name).properties
    assert DEPLOYMENTS[name].get("parameters", {}).keys() <= fields.keys()
    assert [field for field, about in fields.items() if not about.get("description")] == []


def test_a_rerun_needs_a_run_and_a_name_for_the_fork():
    schema = form("rerun")
    assert schema.required == ["run", "fork"]
    assert DEPLOYMENTS["rerun"]["work_pool"]["name"] == "calligrapher-train"
    assert schema.properties["stage"]["examples"] == ["round-0003/update"]


def test_the_evaluation_waits_for_the_event_that_the_training_sends():
    triggers = DEPLOYMENTS["on-checkpoint"]["triggers"]
    assert [trigger["expect"] for trigger in triggers] == [[CHECKPOINT_EVENT]]
