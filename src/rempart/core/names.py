"""Names of classes: which class of a model a class of data is, however the two spell it."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from rempart.core.errors import DataError

_WHOLE = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_ENCODINGS = ("cp437", "gb18030", "cp932", "big5", "cp949", "cp850", "cp1252", "cp866", "cp1251")
"""What programs write into zip archives that do not say UTF-8."""
_SYNSET = re.compile(r"n[0-9]{8}")

How = Literal["name", "spelling", "encoding", "number", "order", "numbers in text order", "different names"]


class Numbers(tuple[str, ...]):
    """Class names that only count the classes: those of data and models that bring no names."""

    __slots__ = ()

    @classmethod
    def of(cls, number: int) -> "Numbers":
        """0 to `number` - 1."""
        return cls(map(str, range(number)))


class Undecoded(tuple[str, ...]):
    """Class names from bytes in an encoding that is not known, read as CP437, which knows every byte."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Match:
    """Which class of a model each class of data is.

    Attributes:
        numbers: For each class of the data, the number of the output; -1 where none is and no image needs one.
        how: By name, by name but for its spelling or encoding; by number, because the labels are numbers; in order,
            because the model has no names; or in order, although the names differ.
    """

    numbers: tuple[int, ...]
    how: How


def normal(name: str) -> str:
    """A name in one form: Unicode NFC, without space around it. A Mac writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name).strip()


def whole(text: str) -> int | None:
    """The whole number that a text is, however it is written (7, 07, +7, 7.0, 7e0); None for anything else."""
    number = Decimal(text.strip()) if _WHOLE.fullmatch(text.strip()) else Decimal("0.5")
    return int(number) if number == number.to_integral_value() else None


def is_number(text: str) -> bool:
    """Whether a text is a number, whole or not."""
    return _WHOLE.fullmatch(text.strip()) is not None


def find(name: str, names: Sequence[str]) -> int | None:
    """The position of a name: as it stands, in another normal form, or in a spelling that only one of them has."""
    return _places([name], names)[0]


def _places(own: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The position of each name; what two others share in one spelling may still differ in the one before."""
    found: dict[str, int] = {}
    for form in (str, normal, _folded):
        places = {form(name): k for k, name in enumerate(names)}
        shared = {name for name, count in Counter(map(form, names)).items() if count > 1}
        for name in own:
            if name not in found and form(name) in places.keys() - shared:
                found[name] = places[form(name)]
    return [found.get(name) for name in own]


def match(own: Sequence[str], names: Sequence[str], labels: Collection[int]) -> Match:
    """Which class of a model each class of data is.

    Args:
        own: The class names of the data.
        names: Those of the model.
        labels: The classes that occur.

    Raises:
        DataError: If that cannot be known.
    """
    if isinstance(own, Undecoded):
        return _decoded(own, names)
    if isinstance(own, Numbers):
        return _counted(own, names, labels)
    if _stand_in(names) and (isinstance(names, Numbers) or all(whole(name) is None for name in own)):
        return _in_order(own, names)
    if (found := _by_name(own, names)) is not None:
        return found
    places = _places(own, names)
    if None not in places:
        (place, _), *_ = Counter(places).most_common(1)
        twins = [name for name, other in zip(own, places, strict=True) if other == place]
        came = f"{' and '.join(map(repr, twins))}, which are one class of the model"
        raise DataError(_expected(names), got=came, hint="write each class in one way")
    if any(place is not None for place in places) or len(own) != len(names):
        raise _unmatched(own, names, [name for name, place in zip(own, places, strict=True) if place is None])
    return Match(tuple(range(len(own))), "different names")


def _by_name(own: Sequence[str], names: Sequence[str]) -> Match | None:
    """Each class by its name, one to one; None where that cannot be."""
    places = [place for place in _places(own, names) if place is not None]
    if len(set(places)) < len(own):
        return None
    same = all(normal(name) == normal(names[place]) for name, place in zip(own, places, strict=True))
    return Match(tuple(places), "name" if same else "spelling")


def _folded(name: str) -> str:
    """A name without what people vary: case, spaces, hyphens, underscores; numbers without zeros that say nothing."""
    number = whole(name)
    plain = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())
    return str(number) if number is not None else plain or normal(name)


def _stand_in(names: Sequence[str]) -> bool:
    """Whether names only count, also as the configurations of Hugging Face do that were given none."""
    return any(list(names) == [f"{word}{k}" for k in range(len(names))] for word in ("", "LABEL_"))


def _counted(own: Numbers, names: Sequence[str], labels: Collection[int]) -> Match:
    """Labels that are numbers: they count outputs, but for a model whose names are other numbers."""
    values = {value: k for k, name in enumerate(names) if (value := whole(name)) is not None}
    if len(values) == len(names) and not _stand_in(names):
        if not set(labels) <= values.keys():
            missing = [str(label) for label in sorted(labels) if label not in values]
            raise _unmatched(own, names, missing)
        return Match(tuple(values.get(k, -1) for k in range(len(own))), "name")
    if len(own) > len(names):
        hint = "choose the data the model was trained for"
        if labels and min(labels) >= 1 and max(labels) == len(names):
            hint = f"the labels seem to be counted from 1 to {len(names)}: subtract 1 from each, classes start at 0"
        raise DataError(_expected(names), got=f"{len(own)} ({some(own)})", hint=hint)
    return Match(tuple(range(len(own))), "number")


def _in_order(own: Sequence[str], names: Sequence[str]) -> Match:
    """Named classes for a model without names: as they are sorted."""
    if len(own) != len(names):
        hint = f"the model brings no class names, so the data must have all {len(names)} classes; "
        hint += "name its outputs in their order with --classes to use data of some of them"
        raise DataError(_expected(names), got=f"{len(own)} ({some(own)})", hint=hint)
    values = [value for name in own if (value := whole(name)) is not None]
    sorted_as_text = len(values) == len(own) and values != sorted(values)
    return Match(tuple(range(len(own))), "numbers in text order" if sorted_as_text else "order")


def _decoded(own: Undecoded, names: Sequence[str]) -> Match:
    """Names in an unknown encoding: the one in which they are the model's tells."""
    readings = list(_readings(own))
    hint = "zip the folder again with names in UTF-8, or use the folder itself"
    expected, got = f"class names in UTF-8 (the model's: {some(names)})", f"names in another encoding, such as {own[0]}"
    if _stand_in(names):
        orders = {tuple(sorted(range(len(own)), key=reading.__getitem__)) for reading in readings}
        if len(orders) > 1:
            raise DataError(expected, got=got, hint=hint)
        return _in_order(own, names)
    found = {match.numbers for reading in readings if (match := _by_name(reading, names)) is not None}
    if len(found) != 1:
        raise DataError(expected, got=got, hint=hint)
    return Match(found.pop(), "encoding")


def _readings(own: Undecoded) -> Iterable[tuple[str, ...]]:
    for encoding in _ENCODINGS:
        try:
            yield tuple(name.encode("cp437").decode(encoding) for name in own)
        except UnicodeError:
            continue


def _expected(names: Sequence[str]) -> str:
    return f"data with the model's {len(names)} classes ({some(names)})"


def _unmatched(own: Sequence[str], names: Sequence[str], unknown: Sequence[str]) -> DataError:
    """Class names of data of which the model has none, or only some."""
    hint = "rename the classes of the data, or name the model's outputs in their order with --classes"
    if all(map(_SYNSET.fullmatch, unknown)):
        hint = "these are WordNet ids: rename the class folders to the names that the model uses"
    got = f"{len(own)} ({some(own)})" if len(own) != len(names) else some(own)
    if len(unknown) < len(own):
        got += f", of which it does not have {some(unknown)}"
    return DataError(_expected(names), got=got, hint=hint)


def some(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def respelt(own: Sequence[str], names: Sequence[str], numbers: Sequence[int]) -> Mapping[str, str]:
    """The names of the data that are spelt otherwise in the model, with how."""
    return {name: names[k] for name, k in zip(own, numbers, strict=True) if normal(name) != normal(names[k])}
