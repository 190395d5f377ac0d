"""Draws what each letter of a group's images is told: the picture of docs/algorithms.md.

    python tests/scripts/letter_credit.py runs/NAME --round 3 --group 0 --out letters.png

Takes a round of a run with `advantage.per_letter`. Each image of the group has its letters' boxes,
green above the group's other images and red below, the stronger the farther, with the advantage in
standard deviations; below it what was read and the advantage of the image as a whole.
"""

import argparse
import io
from pathlib import Path

from PIL import Image, ImageDraw

from calligrapher.tables.parquet import read_shard, read_table
from tasks.artifacts.layout import round_name
from tasks.pictures.fonts import font
from tasks.pictures.sheets import BAD, GAP, GOOD, INK, MARGIN, PAPER, SMALL

SIDES = ("left", "right", "top", "bottom")
_FACTOR = 4  # how much a picture is enlarged


def members(folder: Path, group: int) -> list[dict]:
    """Return the rows of a group: image, text, what was read, its letters and advantage."""
    found = []
    for shard in sorted((folder / "rollout").glob("*.parquet")):
        rows = read_shard(shard, ["sample_id", "group_id", "text", "image"])
        found += [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    found = [row for row in found if row["group_id"] == group]
    read = {}
    for table in sorted((folder / "score").glob("*.parquet")):
        scores = read_table(table, ["sample_id", "ocr_text"])
        read |= dict(zip(scores["sample_id"], scores["ocr_text"], strict=True))
    told = read_table(folder / "advantage" / "advantages.parquet")
    place = {name: number for number, name in enumerate(told["sample_id"])}
    for row in found:
        at = place[row["sample_id"]]
        row |= {"read": read[row["sample_id"]], "letters": told["letters"][at]}
        row["advantage"] = told["advantage"][at]
    return found


def drawn(row: dict) -> Image.Image:
    """Return one image with its letters' boxes and a line below."""
    image = Image.open(io.BytesIO(row["image"])).convert("RGB")
    image = image.resize((image.width * _FACTOR, image.height * _FACTOR), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (image.width, image.height + 2 * SMALL + 20), PAPER)
    sheet.paste(image, (0, SMALL + 6))
    pen, face = ImageDraw.Draw(sheet, "RGBA"), font(SMALL)
    for letter in row["letters"]:
        colour = GOOD if letter["advantage"] > 0 else BAD
        strength = round(min(abs(letter["advantage"]), 2.0) / 2.0 * 130)
        left, right, top, bottom = (_FACTOR * letter[side] for side in SIDES)
        box = (left + 1, top + SMALL + 6, right - 1, bottom + SMALL + 6)
        tint = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        pen.rectangle(box, fill=(*tint, strength), outline=(*tint, 255))
        words = f"{letter['advantage']:+.1f}"
        middle = (box[0] + box[2] - face.getlength(words)) / 2
        pen.text((middle, 2), words, fill=colour, font=face)
    words = f"{row['text']} read {row['read'] or '-'}   image {row['advantage']:+.1f}"
    pen.text((0, sheet.height - SMALL - 6), words, fill=INK, font=face)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cells = [drawn(row) for row in members(options.run / round_name(options.round), options.group)]
    wide, high = cells[0].size
    rows = -(-len(cells) // options.columns)
    size = (options.columns * (wide + GAP) - GAP, rows * (high + GAP) - GAP)
    sheet = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN), PAPER)
    for number, cell in enumerate(cells):
        row, column = divmod(number, options.columns)
        sheet.paste(cell, (MARGIN + column * (wide + GAP), MARGIN + row * (high + GAP)))
    sheet.save(options.out)


if __name__ == "__main__":
    main()
