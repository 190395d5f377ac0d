"""A report tells a run from its folder alone: half done, without evaluations, or compared."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from calligrapher.errors import ArtifactError
from tasks.reports.page.document import REPORT_FILE, write_report
from tasks.reports.page.facts import RunFacts
from tasks.runs.rerun import prepare_rerun


def report(*folders):
    out = folders[0] / REPORT_FILE
    write_report(folders, out)
    return out.read_text()


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.partition("<body>")[2]))


def test_a_run_is_told_with_its_numbers_pictures_and_origin(train, judged):
    folder, summary = train("one", scorer=judged(0.25, 0.5), evaluate={"every": 1})
    html = report(folder)
    told = words(html)
    assert "Held-out OCR accuracy 0.000 [0.000, 0.000] → 0.500 [0.500, 0.500]" in told
    assert "nft, 2 of 2 rounds, finished; 18 images" in told
    assert summary["adapter_digest"][:16] not in told, "a checkpoint is named by its artifact"
    update = json.loads((folder / "round-0001/update/artifact.json").read_text())
    assert f"round-0001/update {update['digest'][:16]}" in told
    assert update["inputs"]["train_data"][:16] in told
    assert re.search(r"update\.learning_rate\s+0\.001\s+0\.0001", told)
    assert "update.max_grad_norm" not in told, "it has its default"
    assert html.count('class="frames grid"') == 1
    labels = ["before training", "after 1 round", "after 2 rounds"]
    assert re.findall(r'data-label="([^"]+)"', html) == labels
    assert html.count('class="small"') >= 2, "a histogram for each round"
    assert re.search(r"rollout \d+% 2 ", told)
    assert "http" not in html.replace("http-equiv", "")


def test_where_style_is_measured_it_stands_beside_accuracy(train, scorer_class):
    class Stylish(scorer_class):
        def row(self, image, case):
            return super().row(image, case) | {"style_score": 0.25}

    folder, _ = train("one", scorer=Stylish(), rounds=1, evaluate={"every": 1})
    told = words(report(folder))
    assert "Held-out style 0.250 [0.250, 0.250] → 0.250 [0.250, 0.250]" in told
    plain, _ = train("plain", rounds=1, evaluate={"every": 1})
    assert "Held-out style" not in words(report(plain))
    both = words(report(plain, folder))
    assert re.search(r"minus the first style after training plain nft .* one nft", both)
    assert both.count("0.250 [0.250, 0.250]") == 3, "in the comparison, and in its own section"


def test_what_a_run_holds_never_becomes_markup(train, scorer_class):
    evil = "<script>alert(1)</script>"

    class Reads(scorer_class):
        def row(self, image, case):
            return super().row(image, case) | {"ocr_text": f'"{evil}'}

    folder, _ = train("one", scorer=Reads(), rounds=1, evaluate={"every": 1})
    (folder / "errors.log").write_text(f"2026-11-27 01:00:00\nTraceback\n  x\nError: {evil}\n")
    html = report(folder)
    assert evil not in html
    assert html.count("&quot;&lt;script&gt;alert(1)&lt;/script&gt;") > 8
    assert "newest: Error: &lt;script&gt;" in html
    assert html.count("<script>") == 1, "the page's own"


def test_a_run_that_has_only_begun_and_never_evaluates_has_a_report(make_resources, tmp_path):
    from tasks.runs.run import open_run

    with open_run(make_resources("grpo"), tmp_path / "begun") as run:
        run.make("warmup")
        run.make("round-0000/rollout")
    with (run.folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "round-0000/sc')  # as another process is writing it
    told = words(report(run.folder.path))
    assert "The run is not finished: 0 of 2 rounds, nobody works on it." in told
    assert "The run has not evaluated yet, or never does" in told
    assert "No round was scored yet." in told
    assert "Held-out OCR accuracy 0" not in told


def test_alarms_name_damage_unscored_images_gamed_rewards_and_groups_without_spread(
    train, constant_scorer, scorer_class
):
    class Broken(scorer_class):
        def reward(self, image, case):
            reward = super().reward(image, case)
            return None if reward < 0.5 else reward

    folder, _ = train("some", scorer=Broken(), rounds=2, reward={"max_unscored_share": 1.0})
    rows = [row for rows in RunFacts(folder).scored.values() for row in rows]
    unscored = sum(row["reward"] is None for row in rows)
    assert 0 < unscored < len(rows) == 18
    told = f"{unscored} of 18 images have no reward; {unscored} of them: the server gave none"
    assert told in words(report(folder))
    verdicts = folder.parent / "evaluations/some/x/verdicts"
    verdicts.mkdir(parents=True)
    verdict = {"checkpoint": "round-0001", "reward_hacking": ["style since base"]}
    (verdicts / "round-0001.json").write_text(json.dumps(verdict | {"champion": False}))
    (folder / "round-0001/score/scores-0000.parquet").unlink()
    told = words(report(folder))
    assert "The reward may be gamed at round-0001: style since base falls as it rises." in told
    assert "round-0001/score is damaged" in told

    folder, _ = train("flat", scorer=constant_scorer)
    told = words(report(folder))
    assert "In the newest 2 rounds 100% of the groups have equal rewards" in told
    assert "6 of 6 groups had equal rewards and so taught nothing." in told


def test_large_pictures_are_shrunk_and_long_runs_keep_their_file_small(train):
    folder, _ = train("one", rounds=1)
    grid = folder / "report/grid"
    grid.mkdir(parents=True)
    for step in range(60):
        Image.new("RGB", (1200, 600), (step, 0, 0)).save(grid / f"{step:06d}.png")
    html = report(folder)
    labels = re.findall(r'data-label="([^"]+)"', html)
    assert (len(labels), labels[0], labels[-1]) == (24, "before training", "after 59 rounds")
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", html)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (960, 480)


def test_a_fork_and_its_parent_name_each_other(train):
    parent, _ = train("a")
    prepare_rerun(parent, "1/update", ["nft.nft_beta=0.2"], "b")
    said = "rerun of round-0001/update of a with nft.nft_beta=0.2"
    assert f"b is a {said}" in words(report(parent.parent / "b"))
    assert f"forked as b: {said}" in words(report(parent))


def test_several_runs_are_compared(train, judged):
    evaluated = {"every": 1, "num_images_per_case": 1}
    first, _ = train("a", scorer=judged(0.25, 0.5), evaluate=evaluated)
    second, _ = train("b", scorer=judged(0.5, 0.75), evaluate=evaluated, seed=4)
    html = report(first, second)
    told = words(html)
    assert "+0.250 [+0.250, +0.250]" in told
    assert re.search(r"seed\s+3\s+4", told)
    assert html.count("<article") == 3
    assert html.index('id="comparison"') < html.index('id="run-0"') < html.index('id="run-1"')
    assert "Comparison" not in words(report(first))


def test_a_folder_that_is_no_run_has_no_report(tmp_path):
    with pytest.raises(ArtifactError, match="must be the folder of a run"):
        write_report([tmp_path], tmp_path / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_letters_are_told_from_the_unlikeliest_on_at_first_and_now(train, scorer_class):
    class Spells(scorer_class):
        def row(self, image, case):
            likely = [0.25] + [0.75] * (len(case.text) - 1)
            box = {"left": 0.0, "top": 0.0, "right": 9.0, "bottom": 9.0}
            letters = [{"likelihood": one} | box for one in likely]
            return super().row(image, case) | {"ocr_likelihood": 0.5, "ocr_letters": letters}

    compared = {"combine": "standardized", "per_letter": True}
    reward = {"likelihood_weight": 1.0}
    folder, _ = train("one", scorer=Spells(), rounds=2, advantage=compared, reward=reward)
    told = words(report(folder))
    assert "Letters How likely the OCR found each letter" in told
    (table,) = re.findall(r"letter at first now places ((?:\w \S+ 0\.\d+ \d+ )+)", told)
    rows = [row.split() for row in re.findall(r"\w \S+ 0\.\d+ \d+", table)]
    values = [float(now) for _, _, now, _ in rows]
    assert values == sorted(values)
    assert values[0] < values[-1] == 0.75
    cases = {row["text"] for row in RunFacts(folder).scored[1]}
    assert {letter for letter, *_ in rows} == {letter for text in cases for letter in text.lower()}
    assert sum(int(places) for *_, places in rows) == 3 * sum(map(len, cases))
    plain, _ = train("two", rounds=1)
    assert "Letters How" not in words(report(plain))
