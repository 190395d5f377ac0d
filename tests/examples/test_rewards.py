"""The scorers in examples/rewards: loaded as a server loads them, with their calibration."""

import base64
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.scorer_files import ScorerFile
from reward_server.scorers.base import Item, probe_item
from reward_server.scorers.own import load_own

EXAMPLES = Path(__file__).parents[2] / "examples" / "rewards"


def loaded(name, spec):
    return load_own(ScorerFile.parse(name, f"{EXAMPLES}/{spec}"))


def values(scorer, items):
    return [one.values.get(scorer.name) for one in scorer.score_items(items)]


def written(size, *, box=(20, 10, 180, 50), ground="white", ink="black", at=None):
    """A picture of 200 x 60 with `Hello` in `size` pixels in the mask `box`."""
    image = Image.new("RGB", (200, 60), ground)
    left, top, right, bottom = box
    if size:
        font = ImageFont.load_default(size)
        middle = at or ((left + right) / 2, (top + bottom) / 2)
        ImageDraw.Draw(image).text(middle, "Hello", fill=ink, font=font, anchor="mm")
    mask = np.zeros((60, 200), bool)
    mask[top:bottom, left:right] = True
    pixels = np.asarray(image)
    return Item(pixels, pixels[top:bottom, left:right], "Hello", mask=mask, prompt="a shop sign")


def test_the_size_of_a_text_is_its_share_of_the_mask():
    scorer = loaded("text_size", "text_size.py:TextSize")
    large, half, small = values(scorer, [written(48), written(24), written(12)])
    assert large > 0.8
    assert half == pytest.approx(large / 2, abs=0.08)
    assert small == pytest.approx(large / 4, abs=0.08)
    light = values(scorer, [written(24, ground="black", ink="white")])[0]
    assert light == pytest.approx(half, abs=0.03)


def test_a_mask_without_ink_has_no_size_and_ink_outside_counts_nothing():
    scorer = loaded("text_size", "text_size.py:TextSize")
    beside = written(10, box=(120, 10, 180, 50), at=(50, 30))
    assert values(scorer, [written(0), beside, written(24, ink=(250, 250, 250))]) == [None] * 3
    sensitive = loaded("text_size", "text_size.py:TextSize?contrast=2")
    assert values(sensitive, [written(24, ink=(250, 250, 250))])[0] > 0.3
    whole = replace(written(24), mask=None)
    assert values(scorer, [whole])[0] < values(scorer, [written(24)])[0]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of a few thousand random weights in the published layout."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    words = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {word: place for place, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    text = {**sizes, "vocab_size": len(vocab), "max_position_embeddings": 12}
    text |= {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": 1}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        path
    )
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_clip_alignment_is_the_models_own_cosine_for_each_item_alone(clip_folder):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    scorer = loaded("clip", f"clip_alignment.py:CLIPAlignment?folder={clip_folder}")
    items = [written(24), replace(written(40), prompt="a word that is longer than the model")]
    found = values(scorer, items)
    assert len(set(found)) == 2
    assert all(-1 <= value <= 1 for value in found)
    assert [values(scorer, [item])[0] for item in items] == found
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    given = processor(
        text=["a shop sign"], images=[Image.fromarray(items[0].image)], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**given).logits_per_image.item()
    assert found[0] == pytest.approx(logits / model.logit_scale.exp().item(), abs=1e-5)
    cropped = loaded("clip", f"clip_alignment.py:CLIPAlignment?folder={clip_folder}&crop=yes")
    assert values(cropped, items)[0] != found[0]


def test_clip_alignment_is_known_by_its_weights_and_its_arguments(clip_folder):
    spec = f"clip_alignment.py:CLIPAlignment?folder={clip_folder}"
    info = loaded("clip", spec).info
    assert info["argument folder"].startswith("sha256:")
    assert info["lowest"] == "-1"
    assert loaded("clip", f"{spec}&crop=yes").info != info
    with pytest.raises(RuntimeError, match="crop must be yes or no"):
        loaded("clip", f"{spec}&crop=1")


@pytest.fixture
def judge():
    """A server that gives each picture its mean brightness, or what `status` and `answer` say."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            raw = self.rfile.read(int(self.headers["content-length"]))
            judge.asked.append((dict(self.headers), json.loads(raw)["items"]))
            scores = [brightness(item["image"]) for item in judge.asked[-1][1]]
            body = json.dumps({"scores": scores}).encode() if judge.answer is None else judge.answer
            self.send_response(judge.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    judge = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.asked, judge.status, judge.answer = [], 200, None
    judge.url = f"http://127.0.0.1:{judge.server_port}/score"
    threading.Thread(target=judge.serve_forever, args=(0.02,), daemon=True).start()
    yield judge
    judge.shutdown()
    judge.server_close()


def opened(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def brightness(data):
    return float(opened(data).mean() / 255)


def test_a_remote_model_gets_pictures_masks_and_words(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    scorer = loaded("judge", f"remote_scorer.py:RemoteScorer?url={judge.url}")
    items = [written(24), probe_item()]
    assert values(scorer, items) == pytest.approx([one.image.mean() / 255 for one in items])
    ((headers, (first, second)),) = judge.asked
    assert headers["Authorization"] == "Bearer secret"
    assert np.array_equal(opened(first["image"]), items[0].image)
    assert np.array_equal(opened(first["mask"]) > 127, items[0].mask)
    assert (first["text"], first["prompt"], second["mask"]) == ("Hello", "a shop sign", None)


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (503, b"", "unavailable"),
        (429, b"", "unavailable"),
        (404, b"no such path", "exception"),
        (200, b"{}", "exception"),
        (200, b"<html>", "exception"),
        (200, b'{"scores": []}', "exception"),
        (200, b'{"scores": [NaN]}', "no_number"),
        (200, b'{"scores": [null]}', "refused"),
    ],
)
def test_what_a_remote_model_does_not_score_is_null(judge, status, answer, kind):
    judge.status, judge.answer = status, answer
    scorer = loaded("judge", f"remote_scorer.py:RemoteScorer?url={judge.url}")
    (outcome,) = scorer.score_items([written(24)])
    assert (outcome.values, outcome.kind) == ({}, kind)
    assert set(outcome.errors) == {"judge"}


def test_a_remote_model_that_is_not_there_is_unavailable(judge):
    scorer = loaded("judge", "remote_scorer.py:RemoteScorer?url=http://127.0.0.1:9/")
    assert scorer.score_items([written(24)])[0].kind == "unavailable"
    with pytest.raises(RuntimeError, match="url must begin with"):
        loaded("judge", "remote_scorer.py:RemoteScorer?url=ftp://a")
