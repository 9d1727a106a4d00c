"""What stands after the @ of a data spec: how the files of a data set become images."""

import re
from dataclasses import dataclass

from rempart.core.errors import DataError
from rempart.data import files

PLANES = {"axial": 1, "coronal": 2, "sagittal": 3, "frame": 1}
"""Ways to slice a volume (channel, depth, height, width), with the axis they go along."""
OWN, FULL = "own", "full"

_NUMBER = r"-?[0-9]{1,9}(\.[0-9]{1,9})?"
_WORDS = (
    r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})?",
    "grey",
    "rgb",
    rf"window=({OWN}|{FULL}|{_NUMBER}:{_NUMBER})",
    rf"slice=({'|'.join(PLANES)})(:-?[0-9]{{0,6}}){{0,3}}",
    r"(label|image|mask)=[^@:\[\]]+",
)
PATTERN = "|".join(_WORDS)
EXAMPLES = ("grey", "rgb", "64", "64x48", "window=40:400", "slice=axial:40", "label=fine_label", "mask=FOLDER")


@dataclass(frozen=True, slots=True)
class Modifiers:
    """The words after the @, read.

    Attributes:
        size: Width and height to resize to.
        channels: 1 or 3.
        window: `own`, `full`, or lowest and highest intensity; None: as the first file says.
        plane: How a volume is sliced; None: it is taken whole.
        part: Which slices: one number, or a Python slice; None: all.
        label: Column of the labels in a table.
        image: Column of the images in a table.
        mask: Folder of masks, beside the data.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None
    window: str | tuple[float, float] | None = None
    plane: str | None = None
    part: int | slice | None = None
    label: str | None = None
    image: str | None = None
    mask: str | None = None

    def only(self, *names: str, what: str) -> None:
        """Refuse modifiers that mean nothing for these data."""
        given = {
            "@64": self.size,
            "@grey or @rgb": self.channels,
            "@window": self.window,
            "@slice": self.plane,
            "@label": self.label,
            "@image": self.image,
            "@mask": self.mask,
        }
        if odd := [name for name, value in given.items() if value is not None and name not in names]:
            raise DataError(f"other modifiers for {what}", got=", ".join(odd))


def read_modifiers(text: str) -> Modifiers:
    """Read `@64x48@grey@window=40:400`; the later of two words of a kind counts.

    Raises:
        DataError: If a size is too large or a window empty.
    """
    found: dict[str, object] = {}
    for word in text.split("@")[1:]:
        key, equals, value = word.partition("=")
        if word[0].isdigit():
            width, _, height = word.partition("x")
            size = int(width), int(height or width)
            files.within(size[0] * size[1], files.MAX_PIXELS, "MAX_PIXELS", f"@{word}", "pixels")
            found["size"] = size
        elif not equals:
            found["channels"] = 1 if word == "grey" else 3
        elif key == "window":
            found["window"] = value if value in (OWN, FULL) else _window(value)
        elif key == "slice":
            plane, *bounds = value.split(":")
            found["plane"], found["part"] = plane, _part(bounds)
        else:
            found[key] = value
    return Modifiers(**found)  # pyright: ignore[reportArgumentType]  (the pattern of the spec has checked them)


def _window(text: str) -> tuple[float, float]:
    """Lowest and highest intensity of a window of this centre and width, C:W."""
    centre, width = map(float, text.split(":"))
    if width <= 0:
        raise DataError("a window CENTRE:WIDTH of positive width", got=f"@window={text}")
    return centre - width / 2, centre + width / 2


def _part(bounds: list[str]) -> int | slice | None:
    if len(bounds) == 1 and re.fullmatch("-?[0-9]+", bounds[0]):
        return int(bounds[0])
    try:
        numbers = [int(bound) if bound else None for bound in bounds]
    except ValueError:
        numbers = [None, None, 0]
    if numbers[2:] == [0]:
        raise DataError("slices such as axial, axial:40 or axial:10:60:5", got=f"@slice=...:{':'.join(bounds)}")
    return slice(*numbers) if numbers else None
