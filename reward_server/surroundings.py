"""How far around a mask a picture is looked at when only OCR is on (standard library only).

A client sends no more than that of a large picture; a server refuses what is less.
"""

from dataclasses import dataclass

_REACH = 4  # px; turning a line upright looks a little beyond its box


@dataclass(frozen=True)
class Box:
    """A part of a picture, in px; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def pixels(self) -> int:
        """How many it has."""
        return (self.right - self.left) * (self.bottom - self.top)

    def holds(self, other: "Box") -> bool:
        """Whether another box lies in it."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


def margin_around(mask: Box) -> int:
    """Px around a mask's box in which lines are looked for: half its shorter side, rounded up."""
    return -(-min(mask.right - mask.left, mask.bottom - mask.top) // 2)


def looked_at(mask: Box, size: tuple[int, int]) -> Box:
    """Return the part of a picture of `size` (width, height) that OCR looks at, for a mask's box.

    By hand: a mask of 96 x 32 px in the middle of 512 x 512: 136 x 72 px.
    """
    room = margin_around(mask) + _REACH
    return Box(
        max(mask.left - room, 0),
        max(mask.top - room, 0),
        min(mask.right + room, size[0]),
        min(mask.bottom + room, size[1]),
    )
