"""The commands on a run's folder, as a person calls them, without rewards and servers."""

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from flows.cli.main import command_parser, main


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    """A finished run of one round. The tests leave it as it is."""
    from calligrapher.data.canvas import Canvas
    from calligrapher.tiny.world import write_bench
    from tasks.artifacts.layout import RunsDir
    from tasks.params.run_params import RunParams
    from tasks.resources.rewards import RewardScorer
    from tasks.runs.run import open_run, resources_of

    runs = tmp_path_factory.mktemp("runs")
    write_bench(runs / "cases", num_cases=3, split="train", seed=1)
    weights = {"base": "flux-fill", "siglip": "siglip", "initial_adapter": "calligrapher.bin"}
    model = {key: str(random_model / name) for key, name in weights.items()}
    canvas = {"width": 48, "height": 32, "max_sequence_length": 24, "device": "cpu"}
    params = RunParams.model_validate(
        {
            "rounds": 1,
            "model": model | canvas,
            "data": {"train": str(runs / "cases"), "evaluation": str(runs / "cases")},
            "warmup": {"steps": 0},
            "rollout": {"num_cases": 3, "num_images_per_prompt": 2, "num_inference_steps": 2},
            "reward": {"disable_reward_model": True},
            "nft": {"nft_beta": 1.0, "num_train_sigmas": 1, "kl_coef": 0.1},
            "evaluate": {"every": 0},
            "tracking": {"enabled": False},
        }
    )
    scorer = RewardScorer(params.reward, [], Canvas(48, 32, False))
    with open_run(resources_of(params, RunsDir(runs), scorer), runs / "first") as run:
        run.make_planned()
    return run.folder.path


def run_command(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def test_status_is_a_tree_for_people_and_json_for_programs(folder, capsys):
    status, told = run_command(capsys, "status", folder)
    assert status == 0
    assert told.out.startswith(f"{folder}: nft, 1 of 1 rounds, finished (nobody works on it)")
    status, told = run_command(
        capsys, "status", "first", "--runs-dir", folder.parent, "--json", "--verify"
    )
    found = json.loads(told.out)
    assert (status, found["state"], len(found["stages"])) == (0, "finished", 6)
    assert told.err.startswith("6 artifacts, ")


def test_programs_get_json_of_what_a_run_holds_and_what_differs(folder, capsys):
    status, told = run_command(capsys, "verify", folder, "--json")
    found = json.loads(told.out)
    assert (status, found["artifacts"], found["problems"]) == (0, 6, [])
    status, told = run_command(
        capsys, "why", folder, "round-0000/update", "nft.kl_coef=0.2", "--json"
    )
    found = json.loads(told.out)
    assert (status, found["name"]) == (1, "round-0000/update")
    assert any("nft.kl_coef" in reason for reason in found["reasons"])
    status, told = run_command(capsys, "gc", folder, "--dry-run", "--json")
    assert (status, json.loads(told.out)) == (0, [])
    status, told = run_command(capsys, "best", folder, "--json", "--out", folder.parent / "b.png")
    assert json.loads(told.out) == {"round": "round-0000", "sheet": str(folder.parent / "b.png")}


def test_every_command_that_tells_something_tells_it_to_programs_too():
    # Those that serve, print a script, or print JSON in any case have no need of it.
    without = {"reward-server", "demo", "completion", "rerun", "replay", "pretrain", "cases"}
    told = {name: parser.format_help() for name, parser in leaves(command_parser())}
    assert {name for name, text in told.items() if "--json" not in text} == without


def leaves(parser):
    """Yield the name and the parser of every command that has no commands of its own."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found = list(leaves(inner))
                yield from found or [(name, inner)]


def test_why_answers_with_its_exit_status(folder, capsys):
    status, told = run_command(capsys, "why", folder, "round-0000/update")
    assert (status, told.out) == (0, "round-0000/update is up to date.\n")
    status, told = run_command(capsys, "why", folder / "round-0000/update", "nft.kl_coef=0.2")
    assert (status, told.out) == (
        1,
        "round-0000/update is stale.\n  params.nft.kl_coef: 0.1 -> 0.2\n",
    )
    status, told = run_command(capsys, "why", folder, "round-0007/update")
    assert status == 2
    assert told.err.startswith(
        "ParamsError: the stage must be one of the run's. Got 'round-0007/update'."
    )


def test_verify_names_the_damaged_file(folder, capsys):
    status, told = run_command(capsys, "verify", folder)
    assert status == 0
    assert told.out.startswith("6 artifacts, ")
    path = folder / "round-0000/refresh/old.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        status, told = run_command(capsys, "verify", folder)
    finally:
        path.write_bytes(good)
    assert status == 1
    assert told.out.splitlines()[1:] == [f"damaged: {path}: other bytes than were written"]


def test_gc_of_a_single_round_frees_nothing(folder, capsys):
    status, told = run_command(capsys, "gc", folder, "retention.keep_last=1", "--dry-run")
    assert (status, told.out) == (0, "0 bytes in 0 files would be freed.\n")


def test_gc_takes_no_setting_that_it_does_not_read(folder, capsys):
    status, told = run_command(capsys, "gc", folder, "--dry-run", "nft.kl_coef=0", "rounds=2")
    assert (status, told.out) == (2, "")
    assert "must be one of retention, as nothing else is read. Got nft.kl_coef=0, " in told.err


@pytest.mark.parametrize(
    "overrides", [["rounds=7"], ["retention.keep_last=1", "evaluate.every=0"], ["retention={}"]]
)
def test_a_stage_alone_is_not_made_anew_with_overrides_of_whole_runs(folder, capsys, overrides):
    status, told = run_command(capsys, "rerun", folder, "--fork", "no", "0/update", *overrides)
    assert status == 2
    assert "No stage reads " + overrides[0].partition("=")[0] in told.err
    assert not (folder.parent / "no").exists()


def test_a_stage_is_made_anew_from_its_uri(folder, capsys):
    uri = (folder / "round-0000/update").as_uri()
    status, told = run_command(capsys, "rerun", uri, "nft.kl_coef=0.2", "--fork", "second")
    made = json.loads(told.out)
    assert status == 0
    assert Path(made["artifact"]) == folder.parent / "second/round-0000/update"
    # Equal rewards have nothing to teach.
    assert (made["meta"]["optimizer_steps"], made["meta"]["untaken_steps"]) == (0, 2)
    status, told = run_command(capsys, "rerun", folder, "--fork", "third")
    assert status == 2
    assert "a rerun needs a stage" in told.err
    status, told = run_command(capsys, "rerun", folder, "0/update", "0/score", "--fork", "third")
    assert status == 2
    assert "at most one stage" in told.err


def test_a_replay_ends_with_a_summary(folder, capsys):
    status, told = run_command(capsys, "replay", folder, "nft.kl_coef=0.2", "--fork", "fourth")
    assert status == 0
    assert json.loads(told.out)["run"] == "fourth"


def test_a_reader_that_has_seen_enough_of_it_is_no_error(folder):
    command = (
        "import sys; from flows.cli.main import main; raise SystemExit(main(['status',"
        " sys.argv[1]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", command, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == -signal.SIGPIPE
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN, (
        "commands called in this process leave it as it was"
    )


@pytest.mark.slow
def test_the_flow_makes_a_stage_anew(folder, tmp_path, monkeypatch):
    from flows.rerun import rerun_stage
    from flows.services.prefect_api import prefect_api

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with prefect_api() as url:
        with urllib.request.urlopen(f"{url}/admin/settings") as answer:
            assert json.load(answer)["server"]["analytics_enabled"] is False
        made = rerun_stage(
            "first", "fifth", "0/update", ["nft.kl_coef=0.3"], runs_dir=str(folder.parent)
        )
    assert Path(made["artifact"]) == folder.parent / "fifth/round-0000/update"


def test_runs_and_params_are_listed_and_a_run_is_compared_with_itself(folder, capsys):
    status, told = run_command(capsys, "runs", "--runs-dir", folder.parent)
    assert status == 0
    assert [line for line in told.out.splitlines() if line.startswith("first ")] != []
    status, told = run_command(capsys, "compare", "first", folder, "--runs-dir", folder.parent)
    assert told.out.startswith("The params are the same.")
    assert told.out.endswith("The last evaluations do not compare: a run has none.\n")
    status, told = run_command(capsys, "params", "nft", "--json")
    assert "nft.nft_beta" in [key["name"] for key in json.loads(told.out)]


def test_a_checkpoint_is_measured_beside_the_model_it_came_from(folder, tmp_path, capsys):
    how = tmp_path / "how.yaml"
    how.write_text("num_cases: 2\nnum_images_per_case: 2\nsecond_ocr: none\n")
    status, told = run_command(capsys, "evaluate", folder, "--params", how, "--json")
    found = json.loads(told.out)
    assert (status, found["checkpoint"]) == (0, "round-0000")
    assert not found["champion"], "without a measured accuracy nothing is the best"
    assert found["metrics"]["images"] == 4
    assert set(found["minus"]) == {"base"}
    status, told = run_command(capsys, "evaluate", folder, "round-0000", "--params", how)
    assert told.out.startswith("## first, round-0000\n")
    assert f"{found['metrics']['background_error']:.3f}" in told.out, "it is found, not made again"
    status, told = run_command(capsys, "evaluate", folder, "round-0007", "--params", how)
    assert (status, "must hold the checkpoint 'round-0007'" in told.err) == (2, True)


def test_a_run_is_told_in_one_file(folder, capsys, tmp_path):
    out = tmp_path / "new/first.html"
    status, told = run_command(capsys, "report", folder, "--out", out)
    assert (status, told.out) == (0, f"The report is {out} ({out.stat().st_size / 1e6:.1f} MB).\n")
    assert out.read_text().startswith("<!doctype html>")
