"""A stage call is data: it can go to another process as JSON."""

from pathlib import Path

import pytest

from tasks.launch.calls import StageAnswer, StageCall
from tasks.launch.dispatch import FUNCTIONS, do
from tasks.launch.in_process import InProcess
from tasks.pipeline import STAGES, planned
from tasks.runs.run import open_run


@pytest.mark.parametrize(
    "call",
    [
        StageCall("warmup", {}),
        StageCall("round-0002/score", {"rollout": Path("a/b")}, ahead=Path("c"), earlier=Path("d")),
        StageCall("evaluate", {"checkpoint": Path("w")}, num_cases=3),
    ],
    ids=lambda call: call.name,
)
def test_a_call_comes_back_from_json_as_it_was(call):
    assert StageCall.from_json(call.to_json()) == call


def test_every_stage_of_the_pipeline_has_its_function():
    assert list(FUNCTIONS) == list(STAGES)


class ByMail:
    """Does each call with resources of its own, which know nothing of the run but the JSON."""

    samplers = 0

    def __init__(self, make_resources):
        self.make_resources, self.letters = make_resources, []

    def run(self, call, out):
        self.letters.append(call.to_json())
        return StageAnswer(do(StageCall.from_json(self.letters[-1]), self.make_resources(), out))

    def committed(self, path):
        pass


def test_stages_that_get_their_calls_as_json_make_the_same_bytes(make_resources, tmp_path):
    digests = []
    by_mail = ByMail(make_resources)
    for launcher in (by_mail, InProcess(resources := make_resources())):
        with open_run(resources, tmp_path / type(launcher).__name__, launcher=launcher) as run:
            run.make_planned()
            names = planned(run.params)
            digests.append([run.folder.load(name).digest for name in names])
    assert digests[0] == digests[1]
    assert len(by_mail.letters) == len(names) == 11
