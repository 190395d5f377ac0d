"""Only what OCR looks at of a large picture travels, and every score stays what it was."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeScorer
from PIL import Image

from reward_server.bench.pictures import png, scenes
from reward_server.client.sending import Chunk, sent_items
from reward_server.scorers.base import Outcome
from reward_server.scorers.ocr.lines import Place, lines_in, plain_line, region_around, whole_place
from reward_server.service.forms import parts_of
from reward_server.surroundings import Box, looked_at

HEAD = "multipart/form-data; boundary="


class NearMask(FakeScorer):
    """A scorer that keeps to the mask, and notes what it was shown."""

    keeps_to_the_mask = True

    def __init__(self):
        super().__init__()
        self.items = []

    def score_items(self, items):
        self.items += [item for item in items if item.text != "ll"]  # the probe's
        return [Outcome(dict.fromkeys(self.fields, 0.5) | {"ocr_text": ""}) for _ in items]


def form_of(items, protocol=3) -> tuple[list[dict], dict[str, bytes]]:
    """The items and the pictures of a request."""
    request = Chunk(sent_items(items)).request_for(protocol)
    assert request.content_type.startswith(HEAD)
    parts = {
        name: bytes(part) for name, part in parts_of(request.content_type, request.body).items()
    }
    return json.loads(parts.pop("items"))["items"], parts


def sizes(parts) -> list[tuple[int, int]]:
    return sorted(Image.open(io.BytesIO(part)).size for part in parts.values())


def test_what_is_looked_at_is_the_mask_and_half_its_shorter_side_by_hand():
    mask = Box(208, 240, 304, 272)
    assert looked_at(mask, (512, 512)) == Box(188, 220, 324, 292)  # 32 / 2 + 4 on each side
    assert looked_at(mask, (310, 512)).right == 310
    assert looked_at(Box(0, 0, 7, 3), (512, 512)) == Box(0, 0, 13, 9)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_group_sends_one_mask_and_no_reference_and_of_each_picture_a_part(encoded):
    items = scenes(3, (512, 400))
    if encoded:
        items = [replace(item, image=png(item.image), mask=png(items[0].mask)) for item in items]
        items = [replace(item, mask=items[0].mask) for item in items]
    told, parts = form_of(items)
    assert sizes(parts) == [(136, 72)] * 4  # three pictures, one mask
    assert told[0]["part"] == {"left": 188, "top": 164, "width": 512, "height": 400}
    assert all("reference" not in item for item in told)
    whole, all_of_it = form_of(items, protocol=2)
    assert sizes(all_of_it) == [(512, 400)] * 5
    assert all("part" not in item and "reference" in item for item in whole)


def test_parts_of_png_files_are_the_bytes_of_those_of_pictures_in_memory():
    items = scenes(2, (512, 400))
    files = [replace(item, image=png(item.image), mask=png(item.mask)) for item in items]
    _, of_pictures = form_of([items[0]])
    _, of_files = form_of([files[0]])
    assert of_pictures == of_files
    assert form_of([items[1]])[1] != of_files


def test_all_of_a_picture_is_sent_where_a_part_is_not_worth_it_or_might_mean_another_thing():
    (item,) = scenes(1, (512, 400))
    black, wide = Image.new("L", (512, 400)), Image.new("L", (512, 400), 255)
    clear = item.image.convert("RGBA")
    for other in (
        replace(item, mask=None),
        replace(item, mask=black),
        replace(item, mask=wide),
        replace(item, mask=Image.new("L", (400, 512), 255)),
        replace(item, image=clear),
        replace(item, image=png(item.image)[:900]),
        replace(item, image=item.image.quantize(16)),
    ):
        (told,), _ = form_of([other])
        assert "part" not in told


def test_scorers_see_a_part_where_it_lies_in_its_picture(serve):
    scorer = NearMask()
    items = scenes(2, (512, 400))
    with serve(scorer) as client:
        answers = []
        for protocol in (2, 3, 3):
            request = Chunk(sent_items(items)).request_for(protocol)
            answers.append(
                client.post(
                    "/score_files",
                    content=request.body,
                    headers={"content-type": request.content_type},
                )
            )
    assert [one.status_code for one in answers] == [200] * 3
    assert answers[0].headers["X-Reward-Protocol"] == "3"
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert len(scorer.items) == 4  # the third request is answered from memory
    by_text = {item.text: [one for one in scorer.items if one.text == item.text] for item in items}
    for first, second in by_text.values():
        whole, part = sorted((first, second), key=lambda one: (one.image == 0).mean())
        assert part.image.shape == whole.image.shape == (400, 512, 3)
        assert (part.mask == whole.mask).all()
        assert part.box == whole.box == (184, 216, 208, 304)
        assert (part.image[164:236, 188:324] == whole.image[164:236, 188:324]).all()
        assert not part.image[:164].any()
        assert not part.image[:, :188].any()


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"left": 189, "top": 164, "width": 512, "height": 400}, "part must hold"),
        ({"left": 400, "top": 164, "width": 512, "height": 400}, "ends at 536, 236 of 512 x 400"),
        ({"left": 188, "top": 164, "width": 51200, "height": 40000}, "at most"),
        ({"left": -1, "top": 164, "width": 512, "height": 400}, "part.left"),
        ({"left": 188, "top": 164}, "part.width"),
    ],
)
def test_a_part_that_does_not_hold_what_is_looked_at_fails_alone(serve, part, told):
    items = scenes(2, (512, 400))
    sent, files = form_of(items)
    sent[0]["part"] = part
    if part["left"] == 189:  # its picture and mask begin a column later, too
        for name in (sent[0]["image"], sent[0]["mask"]):
            image = Image.open(io.BytesIO(files[name]))
            files[name + "x"] = png(image.crop((1, 0, *image.size)))
        sent[0] |= {"image": sent[0]["image"] + "x", "mask": sent[0]["mask"] + "x"}
    with serve(NearMask()) as client:
        answer = client.post(
            "/score_files", files={"items": (None, json.dumps({"items": sent})), **files}
        )
    first, second = answer.json()["results"]
    assert told in first["error"]
    assert second["score"]["ocr_accuracy"] == 0.5


def test_a_server_with_a_scorer_that_looks_further_asks_for_whole_pictures(serve):
    sent, files = form_of(scenes(1, (512, 400)))
    with serve(NearMask(), FakeScorer()) as client:
        answer = client.post(
            "/score_files", files={"items": (None, json.dumps({"items": sent})), **files}
        )
    assert answer.headers["X-Reward-Protocol"] == "2"
    assert "the whole picture must be sent" in answer.json()["results"][0]["error"]


def slanted(box, by) -> np.ndarray:
    """A box [4 corners, 2 px] whose corners lie a little aside."""
    return np.array([box[[0, 1]], box[[2, 1]], box[[2, 3]], box[[0, 3]]], dtype=np.float64) + by


@pytest.mark.parametrize("seed", range(8))
def test_all_that_the_models_are_shown_is_the_same_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 255, (180, 260, 3), dtype=np.uint8)
    whole[40:150, 60:200] //= 4  # not noise alone: letters, that reach over the mask here and there
    for x in range(64, 196, 13):
        whole[int(rng.integers(42, 90)) : 125, x : x + 6] = 230
    mask = np.zeros((180, 260), dtype=bool)
    top, left = int(rng.integers(0, 120)), int(rng.integers(0, 180))
    high, wide = (int(one) for one in rng.integers(5, 60, 2))
    mask[top : top + high, left : left + wide] = True
    mask[top, left : left + wide // 2] = seed % 2 == 0  # a rectangle, or none
    white = Place.of(whole, mask)
    box = looked_at(Box(white.left, white.top, white.right, white.bottom), (260, 180))
    part = np.zeros_like(whole)
    inside = (slice(box.top, box.bottom), slice(box.left, box.right))
    part[inside] = whole[inside]
    assert (part != whole).any()

    shown, again = region_around(whole, white), region_around(part, white)
    assert (shown.pixels == again.pixels).all()
    edge_y, edge_x = shown.pixels.shape[0] - 1, shown.pixels.shape[1] - 1
    found = []
    for _ in range(6):  # boxes as a detector gives them: anywhere in what it was shown
        x, y = np.sort(rng.uniform(0, edge_x, 2)), np.sort(rng.uniform(0, edge_y, 2))
        corners = slanted(np.array([x[0], y[0], x[1], y[1]]), rng.normal(0, 2, (4, 2)))
        found.append(shown.to_picture(corners.clip(0, (edge_x, edge_y))))
    of_both = [
        [*lines_in(rgb, found, white), whole_place(rgb, white), plain_line(rgb, white)]
        for rgb in (whole, part)
    ]
    assert len(of_both[0]) == len(of_both[1])
    for one, other in zip(*of_both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.inside, one.whole) == (other.inside, other.whole)
            assert all((a == b).all() for a, b in zip(one.ways, other.ways, strict=True))
            assert all((a == b).all() for a, b in zip(one.boxes, other.boxes, strict=True))
