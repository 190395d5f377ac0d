import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from calligrapher.durable import atomic_path, atomic_write
from calligrapher.errors import ArtifactError
from tasks.artifacts.artifact import Artifact, prune
from tasks.artifacts.digests import path_digest
from tasks.artifacts.layout import INNER
from tasks.artifacts.provenance import Provenance, fingerprint
from tasks.artifacts.run_dir import RunDir

ASKED = Provenance(
    "update",
    params={"learning_rate": 1e-4, "betas": (0.9, 0.99)},
    inputs={"rollout": "ab"},
)


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "runs" / "odd name")


def build_two(folder: Path):
    (folder / "weights.bin").write_bytes(b"\x01" * 7)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "part-0.txt").write_text("three")
    return {"rows": 3}


def no_build(folder):
    raise AssertionError("must not be built")


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_stage_is_built_once_and_then_found(run_dir):
    made = run_dir.ensure("round-0003/update", ASKED, build_two)
    assert made.path == run_dir.path / "round-0003" / "update"
    assert listing(made.path) == ["artifact.json", "shards/part-0.txt", "weights.bin"]
    assert made.meta == {"rows": 3}
    assert made.files["weights.bin"].bytes == 7
    assert made.file("shards/part-0.txt").read_text() == "three"
    made.verify()
    found = run_dir.ensure("round-0003/update", ASKED, no_build)
    assert found == made
    assert [a.path for a in run_dir.artifacts()] == [made.path]


def test_work_that_was_begun_is_gone_on_with_as_it_is_and_ended_once(run_dir):
    folder = run_dir.begin("round-0003/update", ASKED)
    half = folder / ".writing-1-ab-weights.bin"
    half.write_bytes(b"1")

    def build(out):
        assert (out, half.is_file()) == (folder, True)  # whoever works in it may be writing
        half.unlink()
        return build_two(out)

    made = run_dir.ensure("round-0003/update", ASKED, build)
    assert listing(made.path) == ["artifact.json", "shards/part-0.txt", "weights.bin"]
    assert run_dir.begin("round-0003/update", ASKED) is None


def test_work_that_was_begun_for_something_else_is_wiped(run_dir):
    folder = run_dir.begin("a", ASKED)
    (folder / "weights.bin").write_bytes(b"other")
    with pytest.raises(AssertionError, match="must not be built"):
        run_dir.ensure("a", replace(ASKED, params={"learning_rate": 2.0}), no_build)
    assert not (folder / "weights.bin").exists()


def test_equal_bytes_have_equal_digests_whatever_was_asked_for(run_dir):
    one = run_dir.ensure("a", ASKED, build_two)
    two = run_dir.ensure("b", replace(ASKED, params={"learning_rate": 2.0}), build_two)
    other_stage = run_dir.ensure("c", replace(ASKED, stage="refresh"), build_two)
    assert one.digest == two.digest
    assert one.fingerprint != two.fingerprint
    assert other_stage.digest != one.digest


def test_an_artifact_as_an_input_counts_by_its_digest(run_dir):
    one = run_dir.ensure("a", ASKED, build_two)
    two = run_dir.ensure(
        "b", Provenance("refresh", inputs={"update": one.digest}), build_two, inputs=[one]
    )
    assert two.inputs == {"update": one.digest}


def test_the_fingerprint_depends_on_all_that_is_read_and_on_no_order():
    base = fingerprint("score", 1, {"a": 1, "b": [2.5]}, {"x": "1"}, engines=["ocr-6"])
    assert base == fingerprint("score", 1, {"b": [2.5], "a": 1}, {"x": "1"}, engines=["ocr-6"])
    others = [
        fingerprint("scores", 1, {"a": 1, "b": [2.5]}, {"x": "1"}, engines=["ocr-6"]),
        fingerprint("score", 2, {"a": 1, "b": [2.5]}, {"x": "1"}, engines=["ocr-6"]),
        fingerprint("score", 1, {"a": 1, "b": [2.6]}, {"x": "1"}, engines=["ocr-6"]),
        fingerprint("score", 1, {"a": 1, "b": [2.5]}, {"y": "1"}, engines=["ocr-6"]),
        fingerprint("score", 1, {"a": 1, "b": [2.5]}, {"x": "1"}, engines=["ocr-7"]),
    ]
    assert len({base, *others}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint("score", 1, {"a": float("nan")}, {})


def test_other_params_are_refused_with_what_differs_and_what_to_do(run_dir):
    run_dir.ensure("update", ASKED, build_two)
    changed = replace(
        ASKED,
        params={"learning_rate": 2e-4, "betas": [0.9, 0.99]},
        inputs={"rollout": "cd"},
        extra={"engines": "v2"},
    )
    with pytest.raises(ArtifactError) as caught:
        run_dir.ensure("update", changed, no_build)
    text = str(caught.value)
    assert "params.learning_rate: 0.0001 -> 0.0002" in text
    assert "inputs.rollout: ab -> cd" in text
    assert "extra.engines: (absent) -> v2" in text
    assert "reward servers" not in text
    assert "betas" not in text
    assert "new name" in text


def test_other_engines_of_the_reward_are_named_with_a_way_back(run_dir):
    def scored(version):
        by = {"scorers": {"ocr": {"engine": version}}}
        asked = replace(ASKED, stage="score", extra={"scored_by": by})
        return run_dir.ensure("round-0000/score", asked, build_two)

    scored("1.31.1")
    with pytest.raises(ArtifactError) as caught:
        scored("1.31.2")
    assert "extra.scored_by.scorers.ocr.engine: 1.31.1 -> 1.31.2" in str(caught.value)
    assert "start them as they were, on the same kind of CPU" in str(caught.value)


def test_what_a_killed_build_left_is_kept_for_the_same_work_and_wiped_for_other_work(run_dir):
    def killed(folder):
        (folder / INNER).mkdir()
        (folder / INNER / "step-5").write_text("5")
        (folder / "shard-0").write_text("done")
        raise KeyboardInterrupt

    def resume(folder):
        assert (folder / INNER / "step-5").read_text() == "5"
        assert (folder / "shard-0").read_text() == "done"
        raise KeyboardInterrupt

    def afresh(folder):
        assert listing(folder) == ["partial.json"]
        return build_two(folder)

    for build in (killed, resume):
        with pytest.raises(KeyboardInterrupt):
            run_dir.ensure("update", ASKED, build)
        assert not (run_dir.path / "update").exists()
    made = run_dir.ensure("update", replace(ASKED, inputs={"rollout": "other"}), afresh)
    assert listing(made.path) == ["artifact.json", "shards/part-0.txt", "weights.bin"]


def test_inner_checkpoints_do_not_become_part_of_the_artifact(run_dir):
    def build(folder):
        (folder / INNER).mkdir()
        (folder / INNER / "step-5").write_text("5")
        (folder / "result").write_text("r")

    assert listing(run_dir.ensure("a", ASKED, build).path) == ["artifact.json", "result"]


def test_damage_is_found_and_every_damaged_file_named(run_dir):
    def build(folder):
        for name in ("kept", "gone", "longer", "flipped"):
            (folder / name).write_text(name)

    made = run_dir.ensure("update", ASKED, build)
    (made.path / "gone").unlink()
    (made.path / "longer").write_text("longer still")
    (made.path / "flipped").write_text("Flipped")
    with pytest.raises(ArtifactError) as caught:
        made.verify()
    text = str(caught.value)
    assert "gone: missing" in text
    assert "longer: 6 bytes were written, 12 are there" in text
    assert "flipped: other bytes than were written" in text
    assert "kept:" not in text
    with pytest.raises(ArtifactError, match="gone: missing"):
        run_dir.ensure("update", ASKED, no_build)
    with pytest.raises(ArtifactError, match="gone is missing: the artifact is damaged"):
        made.file("gone")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["params"].update(learning_rate=1.0), "changed by hand: its params and inputs"),
        (lambda m: m["files"].pop("weights.bin"), "changed by hand: its list of files"),
        (lambda m: m.update(schema_version=9), "must have schema_version 1. Got 9"),
        (lambda m: m.pop("stage"), "must be a whole manifest"),
    ],
)
def test_a_manifest_that_does_not_agree_with_itself_is_refused(run_dir, edit, message):
    made = run_dir.ensure("update", ASKED, build_two)
    manifest = json.loads((made.path / "artifact.json").read_text())
    edit(manifest)
    (made.path / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(made.path)


def test_a_folder_without_a_manifest_and_a_work_folder_are_no_artifacts(run_dir):
    (run_dir.path / "update").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"holds no artifact\.json"):
        run_dir.ensure("update", ASKED, no_build)
    with pytest.raises(ArtifactError, match="the work folder of an unfinished one"):
        Artifact.load(run_dir.path / "update.partial")


def test_meta_that_is_no_json_is_refused_before_anything_is_committed(run_dir):
    with pytest.raises(ArtifactError, match="must be plain JSON"):
        run_dir.ensure("update", ASKED, lambda folder: {"loss": float("nan")})
    assert not (run_dir.path / "update").exists()


def test_pruning_frees_the_bytes_and_keeps_the_chain(run_dir):
    made = run_dir.ensure("update", ASKED, build_two)
    assert prune(made, ["weights.bin"]) == 7
    assert prune(made, ["weights.bin"]) == 0
    again = run_dir.ensure("update", ASKED, no_build)
    assert again.digest == made.digest
    again.verify()
    assert again.file("shards/part-0.txt").is_file()
    with pytest.raises(ArtifactError, match=r"weights\.bin was deleted by retention"):
        again.file("weights.bin")
    with pytest.raises(ArtifactError, match="It has no nothing"):
        prune(made, ["nothing"])


def test_a_full_disk_is_a_clear_error_and_whole_shards_are_kept(run_dir):
    def build(folder):
        atomic_write(folder / "shard-0", b"whole")
        with atomic_path(folder / "shard-1") as temporary:
            temporary.write_bytes(b"ha")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "shard-1"))

    with pytest.raises(
        ArtifactError, match=r"room for 'rollout'.* bytes are free where .*shard-1 was being"
    ) as e:
        run_dir.ensure("rollout", ASKED, build)
    assert isinstance(e.value.__cause__, OSError)
    assert listing(run_dir.path) == ["rollout.partial/partial.json", "rollout.partial/shard-0"]

    def resume(folder):
        assert (folder / "shard-0").read_bytes() == b"whole"

    assert list(run_dir.ensure("rollout", ASKED, resume).files) == ["shard-0"]


def test_a_full_disk_is_recognised_in_the_words_of_other_libraries(run_dir):
    def build(folder):
        try:
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        except RuntimeError as error:
            raise ValueError("could not save") from error

    with pytest.raises(ArtifactError, match="It is full"):
        run_dir.ensure("update", ASKED, build)


def test_an_error_of_the_stage_itself_comes_through_unchanged(run_dir):
    def build(folder):
        raise OSError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        run_dir.ensure("update", ASKED, build)


def test_a_disk_that_is_really_full_leaves_nothing_half_written(small_disk):
    subprocess.run(["mount", "-o", "remount,size=64k", small_disk], check=True)
    run_dir = RunDir(small_disk)

    def build(folder):
        for i in range(9):
            atomic_write(folder / f"shard-{i}", bytes(20_000))

    with pytest.raises(ArtifactError, match="It is full"):
        run_dir.ensure("rollout", ASKED, build)
    sizes = {p.name: p.stat().st_size for p in (small_disk / "rollout.partial").iterdir()}
    assert sizes.pop("partial.json") > 0
    assert set(sizes.values()) == {20_000}
    assert not (small_disk / "rollout").exists()


def test_the_digest_of_an_input_counts_names_and_bytes_but_not_the_place(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    shutil.copytree(folder, tmp_path / "two")
    assert path_digest(folder) == path_digest(tmp_path / "two")
    before = path_digest(folder)
    (folder / "b").write_text("3")
    changed = path_digest(folder)
    (folder / "b").write_text("2")
    (folder / "b").rename(folder / "c")
    assert len({before, changed, path_digest(folder)}) == 3
    assert path_digest(folder / "a") == path_digest(tmp_path / "two" / "a")
    with pytest.raises(ArtifactError, match="none must be there"):
        path_digest(tmp_path / "none")


def test_weights_behind_a_linked_folder_count_as_if_they_lay_there(tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "model.safetensors").write_text("1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "text_encoder_2").symlink_to(tmp_path / "t5")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    before = path_digest(tmp_path / "model")
    assert before == path_digest(tmp_path / "copy")
    (tmp_path / "t5" / "model.safetensors").write_text("2")
    assert path_digest(tmp_path / "model") != before


def test_a_name_that_is_not_utf_8_has_a_digest_as_well(tmp_path):
    empty = path_digest(tmp_path)
    (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    assert path_digest(tmp_path) != empty


CHILD = """
    import os, signal, sys
    from pathlib import Path
    from tasks.artifacts import run_dir
    from tasks.artifacts.provenance import Provenance

    run, place = run_dir.RunDir(sys.argv[1]), sys.argv[2]
    whole_write, whole_unlink, whole_replace = Path.write_bytes, Path.unlink, os.replace

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def build(folder):
        with open(Path(sys.argv[1]).parent / "builds", "a") as log:
            log.write("b")
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner" / "step").write_text("1")
        whole_write(folder / "one", b"1" * 999)
        if place == "between two files":
            kill()
        whole_write(folder / "two", b"2" * 99)

    def half_write(path, data):
        if path.name.endswith("artifact.json"):
            whole_write(path, data[: len(data) // 2])
            kill()
        return whole_write(path, data)

    def replace(source, target):
        if Path(target).name == ("artifact.json" if "manifest" in place else "update"):
            if place.startswith("after"):
                whole_replace(source, target)
            kill()
        whole_replace(source, target)

    def unlink(path, missing_ok=False):
        whole_unlink(path, missing_ok)
        if path.name == "partial.json":
            kill()

    match place:
        case "between bytes of the manifest":
            Path.write_bytes = half_write
        case "before the manifest's rename" | "before the last rename" | "after the last rename":
            os.replace = replace
        case "while the inner checkpoints go":
            run_dir.shutil.rmtree = kill
        case "after the work folder's note went":
            Path.unlink = unlink
    run.ensure("update", Provenance("update", params={"a": 1}), build)
"""


@pytest.mark.parametrize(
    ("place", "complete", "builds"),
    [
        ("between two files", False, 2),
        ("between bytes of the manifest", False, 2),
        ("before the manifest's rename", False, 2),
        ("while the inner checkpoints go", False, 1),
        ("after the work folder's note went", False, 1),
        ("before the last rename", False, 1),
        ("after the last rename", True, 1),
    ],
)
def test_a_kill_at_any_moment_leaves_no_artifact_or_a_whole_one(tmp_path, place, complete, builds):
    def run_child(place):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path / "run", place]
        return subprocess.run(
            command, cwd=Path(__file__).parents[3], capture_output=True, text=True
        )

    killed = run_child(place)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / "update").exists() == complete
    if complete:
        Artifact.load(tmp_path / "run" / "update").verify()
    resumed = run_child("nowhere")
    assert resumed.returncode == 0, resumed.stderr
    artifact = Artifact.load(tmp_path / "run" / "update")
    artifact.verify()
    assert listing(tmp_path / "run") == ["update/artifact.json", "update/one", "update/two"]
    assert (tmp_path / "builds").read_text() == "b" * builds
