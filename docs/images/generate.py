"""Draws generate.png beside it: a word in a scene replaced, before and after the training of a run.

python docs/images/generate.py RUN FOLDER      (the case's three pictures are written to FOLDER)
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from calligrapher.data.case import Case
from calligrapher.sampling.generate import look
from calligrapher.tiny import world
from tasks.inference.painter import open_painter
from tasks.pictures.sheets import MUTED, PAPER, Span, cell, stacked

SIGN, WORD = (
    (183, 96, 279, 128),
    (186, 100, 276, 124),
)  # The word's six cells, as the tiny world places them.
OLD, NEW, SEEDS = "MARKET", "BAKERY", range(4)
SOURCE_STYLE = world.Style(0, (0.20, 0.16, 0.38), ((0.93, 0.90, 0.82), (0.95, 0.93, 0.86)))
WANTED = world.Style(1, (0.50, 0.08, 0.10), ((0.98, 0.94, 0.86), (0.94, 0.90, 0.84)))


def scene() -> Image.Image:
    """A shop front, 480 x 320, with `OLD` on its sign."""
    picture = Image.new("RGB", (480, 320), (176, 205, 226))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 40, 420, 290), fill=(178, 112, 92))
    for row, y in enumerate(range(40, 290, 10)):
        draw.line((60, y, 420, y), fill=(150, 92, 76))
        for x in range(60 + row % 2 * 12, 420, 24):
            draw.line((x, y, x, y + 10), fill=(150, 92, 76))
    draw.polygon([(40, 40), (240, 4), (440, 40)], fill=(92, 74, 84))
    for x in (84, 300):
        draw.rectangle((x, 156, x + 96, 240), fill=(70, 56, 60))
        draw.rectangle((x + 5, 161, x + 91, 235), fill=(214, 228, 220))
        draw.line((x + 48, 161, x + 48, 235), fill=(70, 56, 60), width=4)
    draw.rectangle((206, 156, 274, 290), fill=(66, 84, 74))
    draw.ellipse((258, 222, 266, 230), fill=(224, 190, 96))
    draw.rectangle((0, 290, 480, 320), fill=(120, 122, 128))
    draw.rectangle((162, 84, 318, 140), fill=(70, 56, 60))
    draw.rectangle((166, 88, 314, 136), fill=(240, 235, 220))
    sign = world.write(world.paper(SOURCE_STYLE), OLD, SOURCE_STYLE)
    picture.paste(world.to_image(sign), SIGN[:2])
    return picture


def drawn_case(folder: Path) -> Case:
    """The scene with a mask over its word, and a reference in another style."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {role: folder / f"{role}.png" for role in ("source", "mask", "reference")}
    scene().save(files["source"])
    mask = Image.new("L", (480, 320))
    mask.paste(255, WORD)
    mask.save(files["mask"])
    world.to_image(world.write(world.paper(WANTED), "STYLED", WANTED)).save(files["reference"])
    return Case(case_id="scene", text=NEW, **files)


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    return cell(picture, [([Span(caption, MUTED)], [])], picture.width + 2)


def main(run: str, folder: Path) -> None:
    painter, case = open_painter(run), drawn_case(folder)
    box = look(painter.model, case, painter.canvas).box
    results = {name: painter.paint(name, case, seeds=SEEDS) for name in ("base", "trained")}
    outlined = scene()
    draw = ImageDraw.Draw(outlined)
    draw.rectangle(WORD, outline=(236, 72, 153))
    draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), outline=(37, 99, 235))
    wholes = [
        (outlined, "source; mask (pink) and crop (blue)"),
        (results["trained"][0], "trained, seed 0"),
    ]
    crops = [
        [
            (scene().crop(box), "crop, 96 x 32"),
            (Image.open(case.reference), f"reference; text {NEW}"),
        ]
    ]
    for name, images in results.items():
        crops.append(
            [(image.crop(box), f"{name}, seed {n}") for n, image in zip(SEEDS, images, strict=True)]
        )
    rows = [[captioned(*whole) for whole in wholes]]
    small = [[captioned(picture.resize((238, 79)), text) for picture, text in row] for row in crops]
    sheet, below = stacked(rows), stacked(small)
    page = Image.new("RGB", (max(sheet.width, below.width), sheet.height + below.height - 8), PAPER)
    page.paste(sheet, (0, 0))
    page.paste(below, (0, sheet.height - 8))
    page.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
