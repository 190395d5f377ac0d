"""What is measured is declared once; wire, client and scorers follow."""

import subprocess
import sys

from reward_server.client import RewardResult
from reward_server.components import LETTERS, LOWEST, MEASURED_BY, NAMES, WEIGHT_OF
from reward_server.scorers.debug import DebugScorer
from reward_server.service.schema import ScoreResponse
from reward_server.settings import Settings


def test_the_wire_type_has_every_component_in_its_range():
    properties = ScoreResponse.model_json_schema()["properties"]
    assert set(properties) == {*NAMES, LETTERS, "errors", "kinds", "reward_model_disabled"}
    ranges = {
        name: (kind["minimum"], kind["maximum"])
        for name in NAMES
        for kind in properties[name]["anyOf"]
        if kind["type"] == "number"
    }
    assert ranges == {name: (lowest, 1) for name, lowest in LOWEST.items()}


def test_what_is_weighed_is_a_number():
    assert set(WEIGHT_OF) <= set(LOWEST) < set(NAMES)
    assert WEIGHT_OF == {
        "ocr_accuracy": "ocr_weight",
        "ocr_likelihood": "likelihood_weight",
        "vlm_score": "vlm_weight",
        "style_score": "style_weight",
    }


def test_the_option_that_measures_a_component_is_one_of_a_server():
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    named = {word for told in MEASURED_BY.values() for word in told.split() if word[:2] == "--"}
    assert set(MEASURED_BY) == set(NAMES)
    assert named <= flags


def test_client_and_debug_scorer_know_every_component():
    assert [getattr(RewardResult(), name) for name in NAMES] == [None] * len(NAMES)
    assert DebugScorer().fields == NAMES


def test_the_table_needs_nothing_but_the_standard_library():
    code = (
        "import sys; old = set(sys.modules); import reward_server.components;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - old})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in loaded if name not in sys.stdlib_module_names} == {"reward_server"}
