"""The frozen encoders run once per case and run, and what they say depends on that case alone."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.errors import DataError
from calligrapher.model import latents
from calligrapher.model.conditioning import ConditioningCache, Encoders

CPU = torch.device("cpu")
CANVAS = Canvas(32, 24)
FIELDS = ("prompt", "pooled", "style", "masked", "image_ids")


def draw(path, size, seed):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def paint(path, box=(4, 4, 20, 12)):
    mask = Image.new("L", (32, 24))
    mask.paste(255, box)
    mask.save(path)


def make_case(folder, number, text, reference=(40, 12)):
    folder.mkdir(exist_ok=True)
    files = {name: folder / f"{number}_{name}.png" for name in ("source", "mask", "reference")}
    draw(files["source"], (32, 24), 2 * number)
    draw(files["reference"], reference, 2 * number + 1)
    paint(files["mask"])
    return Case(case_id=f"case{number}", text=text, **files)


@pytest.fixture
def cases(tmp_path):
    return [make_case(tmp_path / "data", n, text) for n, text in enumerate(["AB", "c d", "'-,"])]


@pytest.fixture
def calls(random_encoders):
    """How often each encoder was run."""
    counts = dict.fromkeys(("vae", "clip", "t5", "siglip"), 0)
    modules = {
        "vae": random_encoders.vae.encoder,
        "clip": random_encoders.pipeline.text_encoder,
        "t5": random_encoders.pipeline.text_encoder_2,
        "siglip": random_encoders.siglip,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what is encoded ---


def test_one_row_holds_what_each_encoder_says_of_the_case(cases, random_encoders):
    found = ConditioningCache(random_encoders, CANVAS, CPU).batch(cases)
    assert found.prompt.shape == (3, 24, 16)
    assert found.pooled.shape == (3, 16)
    assert found.style.shape == (3, 16)
    assert found.masked.shape == (3, 8 * 6 // 4, 4 * (16 + 16))
    assert found.image_ids.shape == (12, 3)
    assert all(not getattr(found, f).requires_grad for f in FIELDS)

    case, pipeline = cases[1], random_encoders.pipeline
    prepared = prepare(case, Canvas(32, 24))
    with torch.no_grad():
        prompt, pooled, _ = pipeline.encode_prompt(
            "The text is 'c d'.", None, max_sequence_length=24
        )
        pixels = random_encoders.image_processor(
            prepared.style_image, return_tensors="pt"
        ).pixel_values
        style = random_encoders.siglip(pixel_values=pixels).pooler_output
    hidden = latents.encode(random_encoders.vae, (prepared.image * (1 - prepared.mask))[None])
    assert torch.equal(found.prompt[1], prompt[0])
    assert torch.equal(found.pooled[1], pooled[0])
    assert torch.equal(found.style[1], style[0])
    assert torch.equal(found.masked[1, :, :64], latents.pack(hidden)[0])


def test_what_the_mask_hides_is_not_encoded(cases, random_encoders, tmp_path):
    case = cases[0]
    before = ConditioningCache(random_encoders, CANVAS, CPU).batch([case])
    image = Image.open(case.source)
    image.paste((255, 0, 0), (4, 4, 20, 12))
    image.save(case.source)
    assert same(ConditioningCache(random_encoders, CANVAS, CPU).batch([case]), before)
    image.paste((255, 0, 0), (20, 12, 24, 16))
    image.save(case.source)
    assert not same(ConditioningCache(random_encoders, CANVAS, CPU).batch([case]), before)


def test_a_row_is_the_same_in_every_batch(cases, random_encoders):
    together = ConditioningCache(random_encoders, CANVAS, CPU).batch(cases)
    order = [2, 0, 2, 1]
    shuffled = ConditioningCache(random_encoders, CANVAS, CPU).batch([cases[i] for i in order])
    assert same(shuffled, together.rows(order))
    for i, case in enumerate(cases):
        assert same(
            ConditioningCache(random_encoders, CANVAS, CPU).batch([case]), together.rows([i])
        )


def test_with_reference_context_the_canvas_grows_and_differently_shaped_references_do_not_mix(
    cases, random_encoders, tmp_path
):
    cache = ConditioningCache(random_encoders, Canvas(32, 24, reference_context=True), CPU)
    tall = make_case(tmp_path / "data", 7, "tall", reference=(32, 32))
    assert cache.batch(cases).masked.shape[1] == 8 * (24 + 16) // 4 // 4
    assert cache.batch([tall]).masked.shape[1] == 8 * (24 + 32) // 4 // 4
    with pytest.raises(
        DataError, match=r"one size\. Found case0 with 20 image tokens, case7 with 28"
    ):
        cache.batch([cases[0], tall])


def test_a_prompt_that_t5_would_cut_is_refused(cases, random_encoders):
    fits = cases[0].model_copy(update={"text": "ABCDEF"})
    tokens = len(random_encoders.pipeline.tokenizer_2(fits.prompt).input_ids)
    random_encoders.max_sequence_length = tokens
    cache = ConditioningCache(random_encoders, CANVAS, CPU)
    cache.batch([fits])
    with pytest.raises(DataError, match=rf"max_sequence_length = {tokens} tokens") as caught:
        cache.batch([cases[0].model_copy(update={"text": "ABCDEFG"})])
    assert str(caught.value).endswith(f"""- case0: "The text is 'ABCDEFG'." has {tokens + 1}""")


def test_all_prompts_are_checked_in_one_pass(cases, random_encoders, caplog):
    random_encoders.check_prompts(cases)
    assert not caplog.text
    long = [case.model_copy(update={"text": case.text + "x" * 20}) for case in cases]
    with pytest.raises(DataError) as caught:
        random_encoders.check_prompts([long[0], cases[1], long[2]])
    assert [line[:7] for line in str(caught.value).splitlines()[1:]] == ["- case0", "- case2"]
    random_encoders.check_prompts([cases[0].model_copy(update={"text": "\u590f"}), cases[1]])
    assert "T5 does not know all characters of 1 text(s): ['case0']" in caplog.text


# --- how often ---


def test_each_case_is_encoded_once_per_run(cases, random_encoders, calls):
    cache = ConditioningCache(random_encoders, CANVAS, CPU)
    for rows in ([0, 0, 1], [1, 2], [2, 0]):
        cache.batch([cases[i] for i in rows])
    assert calls == {"vae": 3, "clip": 3, "t5": 3, "siglip": 3}


def test_a_later_run_reads_the_same_bits_from_disk_and_encodes_nothing(
    cases, random_encoders, calls, tmp_path
):
    first = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache").batch(cases)
    counted = dict(calls)
    second = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache").batch(cases)
    assert same(first, second)
    assert same(first, ConditioningCache(random_encoders, CANVAS, CPU).batch(cases))
    assert counted == {"vae": 3, "clip": 3, "t5": 3, "siglip": 3}
    assert calls["vae"] == 6  # Only the cache without a folder encoded again.
    assert len(entries(tmp_path / "cache")) == 3


def test_where_the_files_lie_and_what_the_case_is_called_do_not_count(
    cases, random_encoders, calls, tmp_path
):
    folder = tmp_path / "cache"
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1])
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    files = {n: tmp_path / "moved" / f"0_{n}.png" for n in ("source", "mask", "reference")}
    moved = cases[0].model_copy(update={"case_id": "other", **files})
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch([moved])
    assert calls["t5"] == 1


def test_cases_of_one_name_from_two_folders_are_not_mixed_up(random_encoders, tmp_path):
    """Training and evaluation folders both have a `test1`."""
    one, two = (make_case(tmp_path / name, 1, text) for name, text in (("a", "AB"), ("b", "CD")))
    cache = ConditioningCache(random_encoders, CANVAS, CPU)
    found = cache.batch([one, two])
    assert one.case_id == two.case_id
    assert not torch.equal(found.prompt[0], found.prompt[1])


def change_mask(case, encoders):
    paint(case.mask, box=(4, 4, 21, 12))


def change_reference(case, encoders):
    draw(case.reference, (40, 12), seed=99)


def change_source(case, encoders):
    draw(case.source, (32, 24), seed=99)


def change_weights(case, encoders):
    encoders.digest = "others"


def change_limit(case, encoders):
    encoders.max_sequence_length = 25


def change_precision(case, encoders):
    for module in (
        encoders.vae,
        encoders.siglip,
        encoders.pipeline.text_encoder,
        encoders.pipeline.text_encoder_2,
    ):
        module.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [change_mask, change_reference, change_source, change_weights, change_limit, change_precision],
)
def test_whatever_the_result_depends_on_makes_another_entry(
    cases, random_encoders, tmp_path, change
):
    folder = tmp_path / "cache"
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1])
    before = entries(folder)
    change(cases[0], random_encoders)
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1])
    assert len(entries(folder)) == 2
    assert set(before) < set(entries(folder))


def test_another_text_or_canvas_makes_another_entry(cases, random_encoders, tmp_path):
    folder = tmp_path / "cache"
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1])
    ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(
        [cases[0].model_copy(update={"text": "x"})]
    )
    for canvas in (Canvas(24, 32), Canvas(32, 24, reference_context=True)):
        ConditioningCache(random_encoders, canvas, CPU, folder).batch(cases[:1])
    assert len(entries(folder)) == 4


def test_a_damaged_entry_is_encoded_again(cases, random_encoders, tmp_path, caplog):
    folder = tmp_path / "cache"
    first = ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1])
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for length in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert same(ConditioningCache(random_encoders, CANVAS, CPU, folder).batch(cases[:1]), first)
        assert path.read_bytes() == whole
    assert caplog.text.count("is damaged") == 3


def test_with_a_folder_memory_holds_the_last_used_and_the_disk_the_rest(
    cases, random_encoders, calls, tmp_path
):
    cache = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache", keep=2)
    for i in (0, 1, 0, 2, 0, 1):
        cache.batch([cases[i]])
        assert len(cache.memory) <= 2
    assert [case.case_id for _, case in cache.memory] == ["case0", "case1"]
    assert calls["t5"] == 3


# --- targets ---


def test_targets_are_the_clean_latents_of_the_target_or_if_asked_for_of_the_source(
    cases, random_encoders, calls, tmp_path
):
    draw(tmp_path / "target.png", (32, 24), seed=77)
    with_target = cases[0].model_copy(update={"target": tmp_path / "target.png"})
    cache = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache")
    with pytest.raises(DataError, match=f"must have a target .* none: .*{cases[0].case_id}"):
        cache.targets([with_target, cases[0]])
    x0 = cache.targets([with_target, cases[0], with_target], reconstruct=True)
    assert x0.shape == (3, 12, 64)
    assert calls == {"vae": 2, "clip": 0, "t5": 0, "siglip": 0}
    for row, name in ((0, "target"), (1, "image")):
        pixels = getattr(prepare(with_target, Canvas(32, 24)), name)[None]
        assert torch.equal(x0[row], latents.pack(latents.encode(random_encoders.vae, pixels))[0])
    assert torch.equal(x0[0], x0[2])
    again = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache")
    assert torch.equal(again.targets([cases[0]], reconstruct=True), x0[1:2])
    with pytest.raises(DataError, match="must have a target"):
        again.targets([cases[0]])


def test_sources_are_the_clean_latents_of_the_whole_source_also_where_there_is_a_target(
    cases, random_encoders, calls, tmp_path
):
    draw(tmp_path / "target.png", (32, 24), seed=77)
    with_target = cases[0].model_copy(update={"target": tmp_path / "target.png"})
    cache = ConditioningCache(random_encoders, CANVAS, CPU, tmp_path / "cache")
    x0 = cache.sources([cases[1], with_target, cases[1]])
    assert x0.shape == (3, 12, 64)
    assert calls == {"vae": 2, "clip": 0, "t5": 0, "siglip": 0}
    pixels = prepare(with_target, Canvas(32, 24)).image[None]
    assert torch.equal(x0[1], latents.pack(latents.encode(random_encoders.vae, pixels))[0])
    assert not torch.equal(x0[1:2], cache.targets([with_target]))


# --- offloading ---


@pytest.mark.parametrize("fails", [False, True])
def test_an_offloaded_text_encoder_leaves_the_device_even_after_an_error(cases, fails):
    moves = []

    def encode_prompt(**_):
        if fails:
            raise RuntimeError("out of memory")
        return torch.zeros(1, 4, 2), torch.zeros(1, 2), None

    class Tokenizer:
        unk_token_id = 0

        def __call__(self, text):
            return SimpleNamespace(input_ids=[1, 2])

    pipeline = SimpleNamespace(
        tokenizer_2=Tokenizer(),
        text_encoder_2=SimpleNamespace(to=lambda where: moves.append(str(where))),
        encode_prompt=encode_prompt,
    )
    encoders = Encoders(pipeline, None, None, "d", 24, offload_text_encoder_two=True)
    if fails:
        with pytest.raises(RuntimeError):
            encoders.encode_prompt(cases[0], torch.device("meta"))
    else:
        encoders.encode_prompt(cases[0], torch.device("meta"))
    assert moves == ["meta", "cpu"]
    moves.clear()
    if not fails:
        dataclasses.replace(encoders, offload_text_encoder_two=False).encode_prompt(cases[0], CPU)
        assert moves == []
