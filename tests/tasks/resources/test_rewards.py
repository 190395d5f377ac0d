"""Rewards: what is weighed, and what of a case is sent to the servers."""

import io

import pytest
from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_table, write_scores
from reward_server.client import RewardResult
from reward_server.components import NAMES, WEIGHT_OF, Letter
from tasks.params.run_params import RewardParams
from tasks.resources.rewards import RewardScorer, check_servers, measured_numbers, reward_of


class Client:
    """Keeps the items it is given; answers what `result` says."""

    def __init__(self, result=None):
        self.items, self.result = [], result or RewardResult(ocr_accuracy=0.5)

    def info(self):
        return {"scorers": {}, "reward_model_disabled": self.result.reward_model_disabled}

    def score_batch(self, items):
        self.items += items
        return [self.result for _ in items]


@pytest.fixture
def scorer():
    def scorer(client, **weights):
        params = RewardParams(**{"vlm_weight": 0.0, "ocr_weight": 1.0} | weights)
        scorer = RewardScorer(params, [], Canvas(16, 8, False))
        scorer.client = client
        return scorer

    return scorer


def case(folder, *, white, case_id="1", reference=(6, 4)) -> Case:
    """A case whose mask is white in the columns from `white` on."""
    folder.mkdir(exist_ok=True)
    mask = Image.new("L", (16, 8))
    mask.paste(255, (white, 0, 16, 8))
    pictures = {"source": Image.new("RGB", (16, 8)), "mask": mask}
    pictures["reference"] = Image.new("RGB", reference, (white, 0, 0))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    paths = {name: folder / f"{name}.png" for name in pictures}
    return Case(case_id=case_id, text="a", **paths)


def opened(png):
    return Image.open(io.BytesIO(png))


def test_every_weight_of_the_params_has_its_component():
    keys = {name for name in RewardParams.model_fields if name.endswith("_weight")}
    assert set(WEIGHT_OF.values()) == keys


def test_a_reward_is_the_weighted_sum_of_what_counts():
    params = RewardParams(ocr_weight=0.5, likelihood_weight=0, vlm_weight=0.25, style_weight=2)
    row = dict.fromkeys(NAMES) | {"ocr_accuracy": 0.5, "vlm_score": 1.0, "style_score": -0.25}
    assert params.component_weights == {"ocr_accuracy": 0.5, "vlm_score": 0.25, "style_score": 2}
    assert reward_of(params, row, {}) == {"reward": 0.25 + 0.25 - 0.5, "reason": None}
    missing = reward_of(params, row | {"vlm_score": None}, {"vlm_score": "it slept"})
    assert missing == {"reward": None, "reason": "vlm_score: it slept"}


def test_style_factors_lessen_the_style_by_what_ocr_read_as_it_counts():
    row = dict.fromkeys(NAMES) | {"ocr_accuracy": 0.5, "ocr_visibility": 0.5, "style_score": 0.8}
    weights = {"ocr_weight": 1, "vlm_weight": 0, "style_weight": 2}
    plain = RewardParams(**weights)
    read = RewardParams(**weights, style_factors=["ocr_accuracy"])
    seen = RewardParams(**weights, style_factors=["ocr_accuracy"], factors=["ocr_visibility"])
    found = [reward_of(params, row, {})["reward"] for params in (plain, read, seen)]
    assert found == pytest.approx([0.5 + 1.6, 0.5 + 1.6 * 0.5, 0.25 + 1.6 * 0.25])
    alone = RewardParams(ocr_weight=0, vlm_weight=0, style_weight=1, style_factors=["ocr_accuracy"])
    assert alone.needed == ("style_score", "ocr_accuracy")
    unread = reward_of(alone, row | {"ocr_accuracy": None}, {"ocr_accuracy": "no such letter"})
    assert unread == {"reward": None, "reason": "ocr_accuracy: no such letter"}
    without_style = RewardParams(style_factors=["ocr_accuracy"], ocr_weight=0, vlm_weight=1)
    assert without_style.needed == ("vlm_score",)


def test_two_cases_with_one_id_are_scored_with_their_own_pictures(scorer, tmp_path):
    client = Client()
    training, held_out = case(tmp_path / "a", white=3), case(tmp_path / "b", white=9)
    one = scorer(client, style_weight=1.0, ocr_weight=0.0)
    for cases in ([training, training], [held_out], [training, held_out]):
        one.score([b"png"] * len(cases), cases)
    boxes = [opened(item.mask).convert("L").getbbox()[0] for item in client.items]
    shades = [opened(item.reference).getpixel((0, 0))[0] for item in client.items]
    assert boxes == shades == [3, 3, 9, 3, 9]


def test_pictures_that_change_on_disk_are_seen(scorer, tmp_path):
    client = Client()
    one = scorer(client)
    one.score([b"png"], [case(tmp_path / "a", white=3)])
    one.score([b"png"], [case(tmp_path / "a", white=5)])
    assert [opened(item.mask).convert("L").getbbox()[0] for item in client.items] == [3, 5]


@pytest.mark.parametrize(
    ("size", "sent"), [((3000, 1500), (1024, 512)), ((10, 2048), (5, 1024)), ((40, 30), (40, 30))]
)
def test_a_reference_is_sent_no_larger_than_it_is_looked_at(scorer, tmp_path, size, sent):
    client = Client()
    scorer(client, vlm_weight=1.0).score([b"png"], [case(tmp_path / "a", white=1, reference=size)])
    assert opened(client.items[0].reference).size == sent


def test_a_reference_that_nobody_looks_at_stays_at_home(scorer, tmp_path):
    client = Client()
    scorer(client, likelihood_weight=1.0).score([b"png"], [case(tmp_path / "a", white=1)])
    assert client.items[0].reference is None


def test_what_no_server_measures_is_said_before_anything_is_painted(scorer):
    client = Client()
    client.info = lambda: {"scorers": {}, "components": ["ocr_text", "ocr_accuracy"]}
    assert scorer(client).identity() == {"scorers": {}}
    told = r"reward\.style_weight must be 0 .* measure style_score\. Got 0\.5\. .* --siglip-path"
    with pytest.raises(RewardError, match=told):
        scorer(client, style_weight=0.5).identity()


def test_named_servers_are_looked_at_before_a_run_starts():
    from scripted import Script

    server = Script()
    alive, dead = server.url, "http://127.0.0.1:9"
    for urls in ([], [alive], [dead, alive]):
        check_servers(RewardParams(server_urls=urls))
    check_servers(RewardParams(server_urls=[dead], disable_reward_model=True))
    with pytest.raises(RewardError, match=r"server_urls must name .* that answer.*127\.0\.0\.1:9"):
        check_servers(RewardParams(server_urls=[dead]))
    server.info["reward_model_disabled"] = True
    with pytest.raises(RewardError, match="made-up numbers"):
        check_servers(RewardParams(server_urls=[dead, alive]))
    server.info = {"scorers": {}, "components": ["ocr_accuracy"]}
    with pytest.raises(RewardError, match=r"reward\.vlm_weight must be 0"):
        check_servers(RewardParams(server_urls=[alive]))
    server.close()


def test_servers_that_cannot_tell_letters_are_refused_where_letters_are_compared():
    from scripted import Script

    server = Script()
    server.info = {"scorers": {}}
    told = r"per_letter must be false .* tell where letters stand\. Got true\. .* newer version"
    with pytest.raises(RewardError, match=told):
        check_servers(RewardParams(server_urls=[server.url]), letters=True)
    server.info = {"scorers": {}, "letters": True}
    check_servers(RewardParams(server_urls=[server.url]), letters=True)
    server.close()


def test_letters_stand_in_a_column_of_their_own_only_where_they_are_asked_about(scorer, tmp_path):
    letters = (Letter(0.25, 0, 1, 2, 3), Letter(1.0, 2, 1, 4, 3))
    result = RewardResult(ocr_accuracy=0.5, ocr_likelihood=0.5, ocr_letters=letters)
    client = Client(result)
    (row,) = scorer(client).score([b"png"], [case(tmp_path / "a", white=1)], letters=True)
    assert client.items[0].letters
    assert row["ocr_letters"] == [vars(letter) for letter in letters]
    write_scores(
        tmp_path / "s.parquet",
        {name: [value] for name, value in row.items()} | {"sample_id": ["0"]},
    )
    assert read_table(tmp_path / "s.parquet")["ocr_letters"] == [row["ocr_letters"]]
    assert not {"ocr_letters"} & set(measured_numbers(row))
    (row,) = scorer(client).score([b"png"], [case(tmp_path / "b", white=1)])
    assert not client.items[-1].letters
    assert "ocr_letters" not in row


def test_a_server_that_answers_without_letters_is_an_error_before_anything_is_written(
    scorer, tmp_path
):
    asked = [b"png"], [case(tmp_path / "a", white=1)]
    with pytest.raises(RewardError, match="newer version of each server"):
        scorer(Client(RewardResult(ocr_likelihood=0.5))).score(*asked, letters=True)
    silent = Client(RewardResult(errors={"ocr_accuracy": "no letters", "ocr_likelihood": "none"}))
    (row,) = scorer(silent).score(*asked, letters=True)
    assert row["reward"] is None
    assert row["ocr_letters"] is None


def test_made_up_numbers_are_no_rewards(scorer, tmp_path):
    made_up = scorer(Client(RewardResult(ocr_accuracy=0.84, reward_model_disabled=True)))
    with pytest.raises(RewardError, match=r"made-up numbers.*reward\.disable_reward_model=true"):
        made_up.identity()
    with pytest.raises(RewardError, match="made-up numbers"):
        made_up.score([b"png"], [case(tmp_path / "a", white=1)])
