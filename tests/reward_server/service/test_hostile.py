"""Bodies that nobody should send, to a real server process: 4xx, no crash, no growth, business as
usual.

`HOSTILE_BODIES=10000` sends as many (150 otherwise).
"""

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import requests
from fakes import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reward_server.processes.launch import local_server

BODIES = int(os.environ.get("HOSTILE_BODIES", "150"))
GOOD = {"image": png(), "prompt": "The text is 'abcd'.", "mask": png()}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, format=kind, **options)
    return buffer.getvalue()


WHOLE = base64.b64decode(GOOD["image"])
BOMB = zlib.compress(b"\0" * (10_001 * 10_000), 9)  # 100 megapixels in 97 KB
PICTURES = [
    png_of(10_000, 10_000, BOMB),
    png_of(12, 8, BOMB),  # far more data than its size holds
    png_of(0, 0, b""),
    png_of(2**31 - 1, 2**31 - 1, b""),
    png_of(12, 8, zlib.compress(b"\0" * 13)),  # two rows of eight
    png_of(12, 8, b"not deflated"),
    png_of(
        12,
        8,
        zlib.compress(b"\0" * 104),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 80_000_000)),
    ),
    png_of(12, 8, zlib.compress(b"\0" * 104), chunk(b"iCCP", b"k\0\0" + b"\xff" * 99)),
    saved("GIF"),
    saved("JPEG"),
    saved("BMP"),
    saved("TIFF"),
    saved("PNG", save_all=True, append_images=[Image.new("RGB", (9, 7))]),  # animated
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"",
]
encode = lambda raw: base64.b64encode(raw).decode()  # noqa: E731
damaged = st.one_of(
    st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]),
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)).map(
        lambda change: WHOLE[: change[0]] + bytes([change[1]]) + WHOLE[change[0] + 1 :]
    ),
    st.sampled_from(PICTURES),
    st.binary(max_size=200),
)
text = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "NaN",
            "null",
            "",
            " ",
            "\0",
            "\ud800",
            "x" * 5000,
            "The text is ''.",
            "\u202e'",
            "../../etc/passwd",
        ]
    ),
    st.text(max_size=12).map(lambda inside: f"The text is '{inside}'."),
)
number = st.one_of(st.floats(), st.integers(), st.integers(min_value=10**300, max_value=10**320))
picture = st.one_of(
    damaged.map(encode),
    st.sampled_from(
        [
            GOOD["image"],
            png(1, 1),
            png(3, 300),
            png(mode="L"),
            png(mode="RGBA"),
            "data:image/png;base64,AA",
        ]
    ),
    st.tuples(damaged.map(encode), st.sampled_from(["\n", "=", "é", "-_", "A"])).map("".join),
    text,
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=8,
)
item = st.fixed_dictionaries(
    {"image": st.one_of(picture, picture, anything), "prompt": st.one_of(text, text, anything)},
    optional={
        "mask": st.one_of(picture, anything),
        "text": st.one_of(text, anything),
        "timestep": st.one_of(number, anything),
        "reference": picture,
        "extra": anything,
    },
)
one_field_off = st.one_of(
    st.tuples(
        st.sampled_from(["image", "mask", "reference"]), st.one_of(picture, damaged.map(encode))
    ),
    st.tuples(st.sampled_from(["prompt", "text"]), text),
    st.tuples(st.just("timestep"), number),
).map(lambda change: {**GOOD, change[0]: change[1]})
item = st.one_of(item, one_field_off, one_field_off)
one = st.tuples(st.just("/score"), st.one_of(item, item, item, anything))
batch = st.tuples(
    st.just("/score_batch"),
    st.one_of(
        st.fixed_dictionaries({"items": st.lists(st.one_of(item, st.just(GOOD)), max_size=5)}),
        anything,
    ),
)
sent = st.one_of(
    st.one_of(one, batch).map(lambda pair: (pair[0], json.dumps(pair[1]).encode())),
    st.tuples(st.sampled_from(["/score", "/score_batch"]), st.binary(max_size=300)),
    st.tuples(
        st.just("/score"), st.integers(1, 40).map(lambda cut: json.dumps(GOOD).encode()[:-cut])
    ),
)


@pytest.fixture(scope="module")
def url():
    flags = ["--max-pixels=1000000", "--max-body-bytes=4000000"]
    with local_server(
        disable_reward_model=os.environ.get("HOSTILE_OCR") != "1", flags=flags
    ) as url:
        yield url


def rss_mib(url: str) -> int:
    pid = requests.get(url + "/health", timeout=10).json()["pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


def test_no_body_makes_a_5xx_or_the_server_grow(url):
    session = requests.Session()
    session.trust_env = False
    counts: dict[int, int] = {}
    session.post(url + "/score", json=GOOD, timeout=60).raise_for_status()
    before = rss_mib(url)

    @settings(
        max_examples=BODIES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(sent)
    def check(request):
        path, body = request
        response = session.post(
            url + path, data=body, headers={"content-type": "application/json"}, timeout=60
        )
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        assert response.status_code in (200, 207, 400, 413, 422), response.text
        assert response.json()
        assert len(response.content) < 20_000

    check()
    good = session.post(url + "/score", json=GOOD, timeout=60)
    assert good.status_code == 200
    growth = rss_mib(url) - before
    print(
        {
            "bodies": sum(counts.values()),
            "statuses": counts,
            "rss_before_mib": before,
            "rss_growth_mib": growth,
        }
    )
    assert growth < 200
    assert len(counts) > 2  # the bodies were not all refused for one reason


@pytest.mark.parametrize("place", range(len(PICTURES)))
def test_each_hostile_picture_is_refused_as_image_and_as_mask(url, place):
    for body in (
        {**GOOD, "image": encode(PICTURES[place])},
        {**GOOD, "mask": encode(PICTURES[place])},
    ):
        response = requests.post(url + "/score", json=body, timeout=60)
        assert response.status_code in (200, 422)
        if response.status_code == 422:
            assert (
                "must" in response.json()["detail"] or "String should" in response.json()["detail"]
            )


def test_a_body_over_the_limit_is_told_so_even_while_it_is_sent(url):
    response = requests.post(url + "/score", data=b"x" * 12_000_000, timeout=60)
    assert response.status_code == 413
    streamed = requests.post(url + "/score", data=(b"x" * 100_000 for _ in range(80)), timeout=60)
    assert streamed.status_code == 413


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_the_openapi_document_is_true(url, mode):
    """Every documented operation, asked as documented and not so; answers must be what is
    documented."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    for operation in [result.ok() for result in schema.get_all_operations()]:
        if mode == "NEGATIVE" and operation.method == "get":
            continue  # no parameters, nothing to get wrong
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

        @settings(
            max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=strategy)
        def check(case):
            # JSON Schema cannot say that a text is the base64 of a PNG, so most good requests are
            # refused.
            case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

        check()
