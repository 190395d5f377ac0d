"""Pictures in and out: every odd file becomes the right numbers or an error that names it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from calligrapher.data import images
from calligrapher.errors import CalligrapherError, DataError

EXIF_ORIENTATION = 0x0112
TURNED_90_CLOCKWISE = 6


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def noise(width, height, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def black_with_white(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


# --- files -> pictures ---


@pytest.mark.parametrize("loader", [images.load_rgb, images.load_mask])
def test_exif_rotation_is_applied(tmp_path, loader):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_90_CLOCKWISE
    pixels = np.zeros((3, 5), dtype=np.uint8)
    pixels[0, 0] = 255  # Top left in the file; top right once upright.
    path = save(tmp_path / "turned.png", pixels, exif=exif)

    loaded = loader(path)

    assert loaded.size == (3, 5)
    assert np.argwhere(np.asarray(loaded.convert("L")) == 255).tolist() == [[0, 2]]


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, :3] = (255, 0, 0)
    pixels[0, :, 3] = (0, 51, 255)  # Clear, a fifth, opaque.

    loaded = images.load_rgb(save(tmp_path / "alpha.png", pixels))

    assert loaded.mode == "RGB"
    assert np.asarray(loaded)[0].tolist() == [[255, 255, 255], [255, 204, 204], [255, 0, 0]]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_key_becomes_white_too(tmp_path, mode):
    key = (0, 0, 0) if mode == "RGB" else 0
    image = Image.new(mode, (3, 3), key)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "key.png", transparency=key)

    assert np.asarray(images.load_rgb(tmp_path / "key.png")).min() == 255


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.tiff")
    assert images.load_rgb(tmp_path / "print.tiff").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "space", "kept"),
    [("CMYK", b"CMYK", False), ("L", b"GRAY", False), ("RGB", b"RGB ", True)],
)
def test_only_the_profile_of_an_rgb_picture_goes_on_with_its_numbers(tmp_path, mode, space, kept):
    profile = bytes(16) + space + bytes(108)
    Image.new(mode, (8, 8)).save(tmp_path / "print.tiff", icc_profile=profile)
    images.load_rgb(tmp_path / "print.tiff").save(tmp_path / "result.png")
    assert ("icc_profile" in Image.open(tmp_path / "result.png").info) == kept


def test_a_camera_picture_with_its_preview_is_one_picture(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert images.load_rgb(tmp_path / "a.jpg").size == (8, 8)


def test_the_transparent_value_of_sixteen_bit_grey_becomes_white(tmp_path):
    grey = np.array([[0, 256, 257]] * 2, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png", transparency=257)
    loaded = np.asarray(images.load_rgb(tmp_path / "deep.png"))
    assert loaded[0, :, 0].tolist() == [0, 1, 255]


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 32767, 32768, 65535]] * 2, dtype=np.uint16)).save(
        tmp_path / "deep.png"
    )
    assert np.asarray(images.load_rgb(tmp_path / "deep.png"))[0, :, 0].tolist() == [
        0,
        127,
        128,
        255,
    ]
    assert np.asarray(images.load_mask(tmp_path / "deep.png"))[0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bit_pictures_are_refused_because_their_range_is_unknown(tmp_path, mode):
    Image.new(mode, (4, 4), 1).save(tmp_path / "deep.tiff")
    with pytest.raises(
        DataError, match=r"deep\.tiff must have 8 or 16 bits per channel\. Found 32"
    ):
        images.load_rgb(tmp_path / "deep.tiff")


def test_a_mask_is_white_from_half_brightness_on(tmp_path):
    path = save(tmp_path / "mask.png", [[0, 1, 127, 128, 255]] * 2)
    assert np.asarray(images.load_mask(path)).tolist() == [[0, 0, 0, 255, 255]] * 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_a_grey_mask_is_read_from_any_mode(tmp_path, mode):
    black_with_white(7, 5, (2, 1, 4, 5)).convert(mode).save(tmp_path / "mask.png")
    mask = images.load_mask(tmp_path / "mask.png")
    assert mask.mode == "L"
    assert images.mask_box(mask) == (2, 1, 4, 5)
    assert set(np.asarray(mask).ravel().tolist()) == {0, 255}


def test_a_coloured_mask_is_refused_and_the_pixels_are_counted(tmp_path):
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[1, :3] = (255, 255, 254)
    with pytest.raises(DataError, match=r"mask\.png must be a grey mask .* Found 3 coloured pixel"):
        images.load_mask(save(tmp_path / "mask.png", pixels))


def test_a_transparent_mask_is_refused(tmp_path):
    pixels = np.full((4, 4, 4), 255, dtype=np.uint8)
    pixels[0, 0, 3] = 254
    with pytest.raises(DataError, match=r"mask\.png must be an opaque mask"):
        images.load_mask(save(tmp_path / "mask.png", pixels))


def whole_png():
    return images.png_bytes(Image.fromarray(noise(31, 17)))


@pytest.mark.parametrize("loader", [images.load_rgb, images.load_mask])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param(None, "Found nothing there", id="missing"),
        pytest.param("folder", "Found a folder there", id="a folder"),
        pytest.param(b"", "Found 0 bytes in no known image format", id="empty"),
        pytest.param(b"<svg/>", "Found 6 bytes in no known image format", id="not an image"),
        pytest.param(whole_png()[:-200], "a whole, readable image", id="cut off"),
        pytest.param(
            whole_png()[:60] + bytes(40) + whole_png()[100:], "readable image", id="overwritten"
        ),
    ],
)
def test_what_cannot_be_read_is_a_data_error_with_the_name(tmp_path, loader, content, found):
    path = tmp_path / "odd.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"odd\.png must .*{found}"):
        loader(path)


# --- pictures <-> tensors ---


def test_every_byte_survives_the_way_to_a_tensor_and_back():
    pixels = np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)
    tensor = images.to_tensor(Image.fromarray(pixels), 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(images.to_image(tensor)), pixels)
    assert np.array_equal(np.asarray(images.to_image(tensor.double().requires_grad_())), pixels)


def test_to_tensor_has_height_first_and_keeps_channels_apart():
    tensor = images.to_tensor(Image.new("RGB", (9, 5), (255, 0, 51)), 7, 3)
    assert tensor.shape == (3, 3, 7)
    assert tensor[0].unique().tolist() == [1.0]
    assert tensor[1].unique().tolist() == [-1.0]
    assert tensor[2].unique().tolist() == pytest.approx([-0.6])


def test_to_tensor_resizes_with_lanczos():
    image = Image.fromarray(noise(23, 11))
    wanted = np.asarray(image.resize((8, 6), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(images.to_image(images.to_tensor(image, 8, 6))), wanted)


def test_to_image_rounds_to_the_nearest_byte_and_clamps():
    # 127.5 * (v + 1): 63.75 -> 64 (cutting off gives 63), 191.25 -> 191; outside [-1, 1] -> 0 and
    # 255.
    tensor = torch.tensor([-0.5, 0.5, -1.7, 3.0]).expand(3, 1, 4)
    assert np.asarray(images.to_image(tensor))[0, :, 0].tolist() == [64, 191, 0, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_number_never_becomes_a_picture(bad):
    tensor = torch.zeros(3, 2, 5)
    tensor[1, 0, 3] = bad
    with pytest.raises(CalligrapherError, match="Found 1 of 30 values NaN or infinite"):
        images.to_image(tensor)


def test_mask_tensors_stay_binary_when_resized():
    mask = images.mask_to_tensor(black_with_white(21, 13, (5, 3, 16, 9)), 9, 7)
    assert mask.shape == (1, 7, 9)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}


# --- layout ---


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((40, 20), (0, 16, 64, 48)),
        ((20, 40), (16, 0, 48, 64)),
        ((7, 7), (0, 0, 64, 64)),
        ((200, 75), (0, 20, 64, 44)),
        ((1000, 2), (0, 31, 64, 32)),  # Would be 0.128 high: stays one row.
        ((64, 64), (0, 0, 64, 64)),
    ],
)
def test_letterbox_keeps_the_aspect_and_centres_on_black(size, box):
    boxed = images.letterbox(Image.new("RGB", size, "white"), 64)
    assert boxed.size == (64, 64)
    assert boxed.getbbox() == box
    assert np.asarray(boxed.crop(box)).min() == 255


def test_letterbox_fills_the_long_side_at_every_size():
    for side in range(1, 700):
        assert (
            images.letterbox(Image.new("RGB", (side, 1 + side // 2), "white"), 53).getbbox()[2]
            == 53
        )


@pytest.mark.parametrize(
    ("size", "width", "height"),
    [
        ((512, 512), 512, 512),
        ((100, 50), 64, 32),
        ((64, 40), 64, 32),  # 40 lies between 32 and 48: a tie goes down.
        ((64, 41), 64, 48),
        ((64, 39), 64, 32),
        ((500, 3), 64, 16),  # Never less than one row of tokens.
        ((33, 77), 48, 112),
    ],
)
def test_reference_context_has_canvas_width_and_a_height_of_whole_tokens(size, width, height):
    assert images.reference_context(Image.new("RGB", size), width).size == (width, height)


def test_stack_context_puts_the_context_on_top_and_paints_nothing_there():
    source = Image.fromarray(noise(48, 32))
    context = Image.new("RGB", (48, 16), (1, 2, 3))
    mask = black_with_white(48, 32, (5, 7, 20, 30))

    image, stacked = images.stack_context(context, source, mask)

    assert image.size == stacked.size == (48, 48)
    assert np.array_equal(np.asarray(image)[:16], np.asarray(context))
    assert np.array_equal(np.asarray(image)[16:], np.asarray(source))
    assert images.mask_box(stacked) == (5, 7 + 16, 20, 30 + 16)


def test_mask_box_is_what_crop_takes():
    mask = black_with_white(9, 7, (2, 3, 5, 4))
    assert images.mask_box(mask) == (2, 3, 5, 4)
    assert mask.crop(images.mask_box(mask)).size == (3, 1)


def test_an_empty_mask_has_no_box():
    with pytest.raises(DataError, match="must have a white pixel"):
        images.mask_box(Image.new("L", (5, 5)))


def test_png_bytes_are_lossless_at_every_level_and_level_1_unless_told():
    image = Image.fromarray(np.tile(noise(3, 64), (1, 30, 1)))
    contents = [images.png_bytes(image, level) for level in (0, 1, 9)]
    for content in contents:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(image))
    assert images.png_bytes(image) == contents[1]
    assert len(contents[1]) < len(contents[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_a_header_is_that_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert images.upright_size(path) == images.load_rgb(path).size
