"""Cases: three kinds of lists are read, and everything that is wrong with them is named at once."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from calligrapher.data.case import Case, prompt_for
from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError, ParamsError

SIZE = (24, 18)


def picture(path, size=SIZE, colour=(10, 20, 30)):
    Image.new("RGB", size, colour).save(path)


def mask(path, size=SIZE, box=(3, 4, 15, 9), mode="L"):
    image = Image.new("L", size)
    image.paste(255, box)
    image.convert(mode).save(path)


def sample(folder, number):
    picture(folder / f"test{number}_source.png", colour=(number, 0, 0))
    mask(folder / f"test{number}_mask.png")
    picture(folder / f"test{number}_ref.png", size=(40, 11), colour=(0, number, 0))


@pytest.fixture
def bench(tmp_path):
    """Samples 1, 2 and 12 and one line for each in both lists."""
    folder = tmp_path / "bench"
    folder.mkdir()
    for number in (1, 2, 12):
        sample(folder, number)
    (folder / "self_bench.txt").write_text("12-word\n1-two words\n2-x\n")
    (folder / "cross_bench.txt").write_text("12-1,2-word\n1-12-other\n")
    return folder


def listed(folder, *lines, kind="self"):
    """Replace the list of `kind`."""
    (folder / f"{kind}_bench.txt").write_text("\n".join(lines), encoding="utf-8")


def jsonl(folder, *records):
    path = folder / "cases.jsonl"
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8"
    )
    return path


def record(number=1, **changes):
    files = {"source": f"test{number}_source.png", "mask": f"test{number}_mask.png"}
    return {**files, "reference": f"test{number}_ref.png", "text": "word", **changes}


def problems(path, kind="self"):
    """The lines of the one error, without its head."""
    with pytest.raises(DataError) as caught:
        load_cases(path, kind)
    return str(caught.value).splitlines()[1:]


# --- what is read ---


def test_the_prompt_ends_with_a_full_stop():
    assert prompt_for("Hi, it's me") == "The text is 'Hi, it's me'."


def test_self_cases_use_their_own_reference_and_keep_the_order_of_the_list(bench):
    first, second, third = load_cases(bench)
    assert (first.case_id, first.text, first.prompt) == (
        "test12-word",
        "word",
        "The text is 'word'.",
    )
    assert first.source == bench / "test12_source.png"
    assert first.mask == bench / "test12_mask.png"
    assert first.reference == bench / "test12_ref.png"
    assert (second.text, third.case_id) == ("two words", "test2-x")


def test_cross_cases_are_one_per_reference(bench):
    cases = load_cases(bench, "cross")
    assert [(c.case_id, c.source.name, c.mask.name, c.reference.name, c.text) for c in cases] == [
        ("test12-ref1-word", "test12_source.png", "test12_mask.png", "test1_ref.png", "word"),
        ("test12-ref2-word", "test12_source.png", "test12_mask.png", "test2_ref.png", "word"),
        ("test1-ref12-other", "test1_source.png", "test1_mask.png", "test12_ref.png", "other"),
    ]


def test_a_cross_reference_needs_no_source_and_no_mask_of_its_own(bench):
    for name in ("test2_source.png", "test2_mask.png"):
        (bench / name).unlink()
    assert len(load_cases(bench, "cross")) == 3


@pytest.mark.parametrize(
    "text", ["a-b", "-", "1,2-x", "a,b", "3-4-5", "'quoted'", "夏天来了", "two  blanks", "é"]
)
def test_the_text_may_hold_the_separators_and_any_script(bench, text):
    listed(bench, f"1-{text}")
    listed(bench, f"1-2-{text}", kind="cross")
    assert [case.text for case in load_cases(bench)] == [text]
    assert [case.text for case in load_cases(bench, "cross")] == [text]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_layout(bench):
    (bench / "self_bench.txt").write_bytes(b"\xef\xbb\xbf\r\n1-a \r\n\r\n  2 - b\r\n")
    assert [(case.source.name, case.text) for case in load_cases(bench)] == [
        ("test1_source.png", "a"),
        ("test2_source.png", "b"),
    ]


def test_blanks_around_a_text_are_layout_in_every_list(bench):
    listed(bench, "1-  two words \t")
    jsonl(bench, record(1, text=" two words\n"))
    for path, kind in ((bench, "self"), (bench / "cases.jsonl", "jsonl")):
        (case,) = load_cases(path, kind)
        assert case.text == "two words"


def test_jsonl_paths_are_relative_to_the_file(bench, monkeypatch):
    path = jsonl(
        bench, record(1), "", record(2, reference="../bench/test12_ref.png", case_id="mine.1")
    )
    monkeypatch.chdir(bench)
    for given in (path, str(path), "cases.jsonl"):
        first, second = load_cases(given, "jsonl")
        assert (first.case_id, first.source) == ("test1_source-word", bench / "test1_source.png")
        assert (second.case_id, second.reference.resolve()) == ("mine.1", bench / "test12_ref.png")


@pytest.mark.parametrize("text", ["word", "two words", "a/b\\c:*?", "夏天来了", "..", "x" * 300])
def test_case_ids_are_stable_and_safe_in_file_names(bench, text):
    listed(bench, f"1-{text}")
    (case,) = load_cases(bench)
    assert re.fullmatch(r"test1-[A-Za-z0-9_]{1,32}(-[0-9a-f]{8})?", case.case_id)
    assert load_cases(bench)[0].case_id == case.case_id


def test_texts_that_look_alike_when_cleaned_keep_ids_of_their_own(bench):
    listed(
        bench, "1-a b", "1-a_b", "1-a-b", "1-a  b", "1-夏", "1-天", f"1-{'x' * 40}", f"1-{'x' * 41}"
    )
    assert len({case.case_id for case in load_cases(bench)}) == 8


def test_the_known_case_id_of_a_cleaned_text(bench):
    listed(bench, "1-two words")  # printf 'two words' | sha256sum
    assert load_cases(bench)[0].case_id == "test1-two_words-a03f1d61"


# --- targets ---


def test_a_self_case_finds_its_target_and_a_cross_case_has_none(bench):
    picture(bench / "test1_target.png")
    picture(bench / "test12_target.png")
    assert [case.target for case in load_cases(bench)] == [
        bench / "test12_target.png",
        bench / "test1_target.png",
        None,
    ]
    assert [case.target for case in load_cases(bench, "cross")] == [None] * 3


def test_a_jsonl_record_may_name_a_target(bench):
    picture(bench / "wanted.png")
    path = jsonl(bench, record(1, target="wanted.png"), record(2), record(12, target=None))
    assert [case.target for case in load_cases(path, "jsonl")] == [bench / "wanted.png", None, None]


def test_a_target_changes_the_digest_and_its_content_too(bench):
    bare = load_cases(bench)[1].digest
    picture(bench / "test1_target.png")
    case = load_cases(bench)[1]
    with_target = case.digest
    picture(bench / "test1_target.png", colour=(9, 9, 9))
    assert len({bare, with_target, case.digest}) == 3
    case.target.unlink()
    with pytest.raises(DataError, match=r"test1_target\.png must be a readable file"):
        _ = case.digest


@pytest.mark.parametrize("kind", ["self", "jsonl"])
def test_one_target_cannot_show_two_texts(bench, kind):
    picture(bench / "test1_target.png")
    listed(bench, "1-a", "2-a", "1-b")
    path = bench
    if kind == "jsonl":
        path = jsonl(
            bench, *(record(1, text=text, target="test1_target.png") for text in "aab"[1:])
        )
    (problem,) = problems(path, kind)
    assert (
        f"{bench / 'test1_target.png'} must show one text. Found it listed for 'a' already."
        in problem
    )


# --- digests ---


def test_the_digest_follows_every_input_and_nothing_else(bench, tmp_path):
    (case,) = load_cases(jsonl(bench, record(1)), "jsonl")
    digest = case.digest
    assert re.fullmatch("[0-9a-f]{64}", digest)

    shutil.copytree(bench, tmp_path / "moved")
    (moved,) = load_cases(jsonl(tmp_path / "moved", record(1, case_id="other")), "jsonl")
    assert moved.digest == digest

    assert case.model_copy(update={"text": "words"}).digest != digest
    assert (
        case.model_copy(update={"reference": case.source, "source": case.reference}).digest
        != digest
    )
    for path in (case.source, case.mask, case.reference):
        before = path.read_bytes()
        path.write_bytes(before + b"\0")
        assert case.digest != digest
        path.write_bytes(before)
    assert case.digest == digest


def test_the_digest_of_a_lost_file_is_an_error_with_its_name(bench):
    case = load_cases(bench)[0]
    case.mask.unlink()
    with pytest.raises(
        DataError, match=r"test12_mask\.png must be a readable file\. Found: No such file"
    ):
        _ = case.digest


def test_a_case_is_frozen_and_knows_no_other_fields(bench):
    case = load_cases(bench)[0]
    with pytest.raises(ValidationError):
        case.text = "other"
    with pytest.raises(ValidationError):
        Case(**case.model_dump(), prompt="Write 'word'")
    assert Case.model_validate_json(case.model_dump_json()) == case


# --- what is refused ---


def test_an_unknown_kind_is_refused_with_the_known_ones(bench):
    with pytest.raises(
        ParamsError, match=r"one of self, cross, jsonl, parquet, huggingface\. Got 'csv'"
    ):
        load_cases(bench, "csv")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere", "self", r"nowhere must be a bench folder\. Found nothing there"),
        ("nowhere", "jsonl", r"nowhere must be a JSONL file\. Found nothing there"),
        (
            "bench/test1_ref.png",
            "cross",
            r"test1_ref\.png must be a bench folder\. Found a file there",
        ),
        ("bench", "jsonl", r"bench must be a JSONL file\. Found a folder there"),
        ("bench/sub", "self", r"sub must hold self_bench\.txt for self cases\. Found no such file"),
        (
            "bench/sub",
            "cross",
            r"sub must hold cross_bench\.txt for cross cases\. Found no such file",
        ),
    ],
)
def test_a_missing_folder_or_list_is_refused(bench, tmp_path, name, kind, message):
    (bench / "sub").mkdir()
    with pytest.raises(DataError, match=message):
        load_cases(tmp_path / name, kind)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("word", "must read N-text, N a whole number. Found 'word'."),
        ("one-word", "must read N-text, N a whole number. Found 'one-word'."),
        ("-1-word", "must read N-text, N a whole number. Found '-1-word'."),
        ("1.5-word", "must read N-text, N a whole number. Found '1.5-word'."),
        ("\u0661-word", "must read N-text, N a whole number. Found '\u0661-word'."),
        ("1", "must read N-text, N a whole number. Found '1'."),
        ("1-", "text must have a visible character. Found ''."),
        ("1-\u200b", "text must have a visible character. Found '\\u200b'."),
        ("1-a\tb", "text must be one line without control characters. Found '\\t' in 'a\\tb'."),
        (
            "1-a\u2028b",
            "text must be one line without control characters. Found '\\u2028' in 'a\\u2028b'.",
        ),
    ],
)
def test_a_malformed_line_of_the_self_list_is_refused(bench, line, problem):
    listed(bench, "2-fine", line)
    assert problems(bench) == [f"- self_bench.txt line 2: {problem}"]


@pytest.mark.parametrize(
    "line", ["12-word", "12-1,-word", "12-1;2-word", "12-a-word", "12--word", "word", ",-x"]
)
def test_a_malformed_line_of_the_cross_list_is_refused(bench, line):
    listed(bench, line, kind="cross")
    found = f"must read N-ref1,ref2-text, N and the refs whole numbers. Found {line!r}."
    assert problems(bench, "cross") == [f"- cross_bench.txt line 1: {found}"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "Input should be an object"),
        ("3", "Input should be an object"),
        (record(text=7), "text: Input should be a valid string"),
        (record(mask=None), "mask: Input should be a valid string"),
        (record(prompt="Write it"), "prompt: Extra inputs are not permitted"),
        (record(case_id="a/b"), "case_id: String should match pattern"),
        (record(case_id=""), "case_id: String should match pattern"),
        (record(case_id=".."), "case_id: String should match pattern"),
        (record(case_id="a\n"), "case_id: String should match pattern"),
        (
            {"source": "a.png"},
            "mask: Field required; reference: Field required; text: Field required",
        ),
        (record(text=""), "text must have a visible character"),
        (record(text=" "), "text must have a visible character"),
        (record(source=""), "source: String should have at least 1 character"),
        (record(target=""), "target: String should have at least 1 character"),
        (
            record(text="two\nlines"),
            "text must be one line without control characters. Found '\\n'",
        ),
        (record(text="a\rb"), "text must be one line without control characters. Found '\\r'"),
    ],
)
def test_a_malformed_line_of_a_jsonl_file_is_refused(bench, line, found):
    (problem,) = problems(jsonl(bench, record(2), line), "jsonl")
    assert problem.startswith("- cases.jsonl line 2: ")
    assert found in problem


def test_a_source_without_a_name_is_refused_as_a_file(bench):
    (problem,) = problems(jsonl(bench, record(2), record(source="/")), "jsonl")
    assert problem.startswith("- cases.jsonl line 2 (text-")
    assert problem.endswith("/ must be an image file. Found a folder there.")


def test_bytes_that_are_no_utf8_are_refused_with_their_line(bench):
    (bench / "self_bench.txt").write_bytes(b"1-fine\n2-caf\xe9\n")
    (problem,) = problems(bench)
    assert problem.startswith("- self_bench.txt line 2: must be UTF-8. Found ")


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_an_empty_list_is_refused(bench, content):
    (bench / "self_bench.txt").write_text(content)
    assert problems(bench) == ["- self_bench.txt: must list at least one case. Found none."]


def test_a_case_that_is_listed_twice_is_refused(bench):
    listed(bench, "1-word", "2-word", "1-word")
    found = "every case must have a case_id of its own. Found that of {}."
    assert problems(bench) == [
        f"- self_bench.txt line 3 (test1-word): {found.format('self_bench.txt line 1')}"
    ]
    listed(bench, "1-2,2-word", kind="cross")
    assert problems(bench, "cross") == [
        f"- cross_bench.txt line 1 (test1-ref2-word): {found.format('cross_bench.txt line 1')}"
    ]


def test_the_same_source_and_text_with_two_styles_need_case_ids(bench):
    styles = [record(1), record(1, reference="test2_ref.png")]
    (problem,) = problems(jsonl(bench, *styles), "jsonl")
    assert "line 2 (test1_source-word): every case must have a case_id of its own" in problem
    styles[1]["case_id"] = "second"
    assert len(load_cases(jsonl(bench, *styles), "jsonl")) == 2


def colour_the_mask(folder):
    image = Image.open(folder / "test1_mask.png").convert("RGB")
    image.putpixel((4, 5), (255, 0, 0))
    image.save(folder / "test1_mask.png")


def save_as_0_and_1(folder):
    pixels = np.asarray(Image.open(folder / "test1_mask.png")) // 255
    Image.fromarray(pixels).save(folder / "test1_mask.png")


def turn_by_exif(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(folder / "test1_source.png", exif=exif)


FULL = (0, 0, *SIZE)

BROKEN = {
    "a source is missing": (
        lambda f: (f / "test1_source.png").unlink(),
        "test1_source.png must be an image file. Found nothing there.",
    ),
    "a mask is missing": (
        lambda f: (f / "test1_mask.png").unlink(),
        "test1_mask.png must be an image file. Found nothing there.",
    ),
    "a reference is missing": (
        lambda f: (f / "test1_ref.png").unlink(),
        "test1_ref.png must be an image file. Found nothing there.",
    ),
    "a source is no image": (
        lambda f: (f / "test1_source.png").write_text("<html>"),
        "test1_source.png must be an image. Found 6 bytes in no known image format.",
    ),
    "a reference is cut off": (
        lambda f: (f / "test1_ref.png").write_bytes((f / "test1_ref.png").read_bytes()[:60]),
        "test1_ref.png must be a whole, readable image.",
    ),
    "a mask has another size": (
        lambda f: mask(f / "test1_mask.png", size=(18, 24)),
        "test1_mask.png must be as large as its source, 24x18. Found 18x24.",
    ),
    "a source turned by EXIF no longer fits its mask": (
        turn_by_exif,
        "test1_mask.png must be as large as its source, 18x24. Found 24x18.",
    ),
    "a mask is empty": (
        lambda f: mask(f / "test1_mask.png", box=(0, 0, 0, 0)),
        (
            "test1_mask.png must have a white pixel (128 to 255, white = paint). Found none: it is"
            " black all over, so nothing would be painted."
        ),
    ),
    "a mask holds 0 and 1": (
        save_as_0_and_1,
        "Found none: its brightest pixel is 1. Save it with 0 and 255.",
    ),
    "a mask covers everything": (
        lambda f: mask(f / "test1_mask.png", box=FULL),
        (
            "test1_mask.png must keep a part of the source (black). Found that it covers the whole"
            " image."
        ),
    ),
    "a mask has a colour": (
        colour_the_mask,
        "test1_mask.png must be a grey mask (red = green = blue). Found 1 coloured pixel(s).",
    ),
    "a source is a row of pixels": (
        lambda f: picture(f / "test1_source.png", size=(24, 1)),
        "test1_source.png must be at least 2 pixels a side. Found 24x1.",
    ),
    "a target has another size": (
        lambda f: picture(f / "test1_target.png", size=(18, 24)),
        "test1_target.png must be as large as its source, 24x18. Found 18x24.",
    ),
    "a target is no image": (
        lambda f: (f / "test1_target.png").write_text("<html>"),
        "test1_target.png must be an image. Found 6 bytes in no known image format.",
    ),
    "a target is a link to nowhere": (
        lambda f: (f / "test1_target.png").symlink_to(f / "gone.png"),
        "test1_target.png must be an image file. Found nothing there.",
    ),
    "a reference is one pixel": (
        lambda f: picture(f / "test1_ref.png", size=(1, 1)),
        "test1_ref.png must be at least 2 pixels a side. Found 1x1.",
    ),
    "a reference is a tower": (
        lambda f: picture(f / "test1_ref.png", size=(5, 41)),
        "test1_ref.png must be at most 8 times as tall as wide. Found 5x41.",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_sample_is_named(bench, what):
    damage, message = BROKEN[what]
    damage(bench)
    found = problems(bench)
    assert any(message in problem for problem in found)
    assert all(problem.startswith("- self_bench.txt line 2 (test1-two_words-") for problem in found)


@pytest.mark.parametrize("inside", [0, 255], ids=["all but one pixel", "a single pixel"])
def test_a_mask_may_paint_a_single_pixel_or_leave_one(bench, inside):
    image = Image.new("RGB", SIZE, (255 - inside,) * 3)
    image.putpixel((7, 5), (inside,) * 3)
    image.save(bench / "test1_mask.png")
    assert len(load_cases(bench)) == 3


def test_a_reference_may_be_eight_times_as_tall_as_wide_and_two_pixels_wide(bench):
    picture(bench / "test1_ref.png", size=(2, 16))
    assert len(load_cases(bench)) == 3


def test_every_broken_sample_is_named_in_one_pass(bench):
    listed(bench, "1-a", "oops", "2-b", "12-", "3-c", "12-fine")
    (bench / "test1_source.png").unlink()
    mask(bench / "test1_mask.png", box=FULL)
    mask(bench / "test2_mask.png", size=(5, 7))

    found = problems(bench)

    places = ["1 (test1-a)", "1 (test1-a)", "2", "3 (test2-b)", "4"] + ["5 (test3-c)"] * 3
    assert [problem.split(": ")[0] for problem in found] == [
        f"- self_bench.txt line {p}" for p in places
    ]
    with pytest.raises(
        DataError, match=r"self_bench\.txt has 8 problem\(s\); mend or remove these samples"
    ):
        load_cases(bench)


def test_a_broken_reference_is_named_for_every_case_that_uses_it(bench):
    listed(bench, "1-2-a", "12-2-b", kind="cross")
    (bench / "test2_ref.png").unlink()
    assert [problem.split(" must")[0] for problem in problems(bench, "cross")] == [
        f"- cross_bench.txt line 1 (test1-ref2-a): {bench / 'test2_ref.png'}",
        f"- cross_bench.txt line 2 (test12-ref2-b): {bench / 'test2_ref.png'}",
    ]
