"""Class folders of image files, in a folder or a zip archive."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch

from rempart.core.errors import DataError
from rempart.core.names import Undecoded, normal
from rempart.data import files
from rempart.data.modifiers import Modifiers
from rempart.data.reading import of_files
from rempart.data.samples import SPLITS, Data, choose, split_of


@dataclass(frozen=True, slots=True)
class _Tree:
    """What lies in class folders.

    Attributes:
        images: The names of the images by split and class; one split `all` where no folder is named like a split.
        spelt: Each class as its folder is spelt; two Unicode forms of a name are one class.
        unread: The files in class folders that are of no known kind, counted by ending.
        others: The folders beside those of splits.
    """

    images: dict[str, dict[str, list[str]]]
    spelt: dict[str, str]
    unread: Counter[str]
    others: tuple[str, ...]


def class_folders(path: Path, split: str, modifiers: Modifiers) -> Data:
    """Images sorted into folders by class, and these into folders by split, or not."""
    store = files.Folder(path) if path.is_dir() else files.open_zip(path)
    found = _tree(store, store.names(), path.name)
    tree, unread = found.images, f" (not read: {files.counted(found.unread)})" if found.unread else ""
    split = "all" if "all" in tree else split
    if not any(names for classes in tree.values() for names in classes.values()):
        raise DataError(
            "class folders of images",
            got=f"none in {path.name}{unread}",
            hint=f"images are {' '.join((*files.SUFFIXES, *files.VOLUMES))}",
        )
    beside = f" (beside the folders {', '.join(found.others)})" if found.others else ""
    choose(split, [name for name in (*SPLITS, "all") if name in tree], f"{path.name}{beside}, as folders,")
    known = tree.get("train", {name: [] for classes in tree.values() for name in classes})
    for name, classes in tree.items():
        if odd := sorted(classes.keys() - known.keys()):
            came = "; ".join(f"{c} only in {name}" for c in odd)
            raise DataError(f"the same classes in train and {name}", got=came)
    class_names = tuple(sorted(known, key=found.spelt.__getitem__))
    if empty := [name for name in class_names if tree[split].get(name) == []]:
        came = f"none in {', '.join(empty)} of {split} in {path.name}{unread}"
        raise DataError("images in every class folder", got=came)

    number = {name: k for k, name in enumerate(class_names)}
    labels = {name: number[class_name] for class_name, names in tree[split].items() for name in names}
    names = tuple(sorted(labels, key=files.order))
    reference = next(tree[name] for name in (*SPLITS, "all") if any(tree.get(name, {}).values()))
    first = min(itertools.chain(*reference.values()), key=files.order)  # the same one for every split
    numbers = torch.tensor([labels[name] for name in names])
    masks = None if modifiers.mask is None else _masks(path.parent / modifiers.mask, names)
    if isinstance(store, files.Zip) and store.undecoded and not all(map(str.isascii, class_names)):
        class_names = Undecoded(class_names)
    data = of_files(store, names, numbers, split, class_names, modifiers, first=first, masks=masks)
    left_out = f"Files of endings that are not read were left out of the class folders: {files.counted(found.unread)}."
    return replace(data, notes=(left_out,)) if found.unread else data


def _masks(root: Path, names: Iterable[str]) -> tuple[files.Folder, list[str]]:
    """The masks that lie in a folder of their own under the names of the images, but for the ending."""
    store = files.Folder(root, closed=True)
    found: list[str] = []
    for name in names:
        ending = next((e for e in (".nii.gz", *files.VOLUMES, *files.SUFFIXES) if name.lower().endswith(e)), "")
        bare = name[: len(name) - len(ending)]
        there = (store.actual(bare + e) for e in (".png", ".nii.gz", ".nii", ".PNG", ".NII.GZ", ".NII"))
        these = {one.casefold(): one for one in there if one is not None and (root / one).is_file()}
        if len(these) != 1:
            raise DataError(f"one mask in {root.name}, a .png, .nii.gz or .nii", got=f"{len(these)} for {name}")
        found += these.values()
    return store, found


def _tree(store: files.Store, names: Iterable[str], place: str) -> _Tree:
    paths = [(name, parts) for name in names if (parts := PurePosixPath(name).parts) and not files.is_noise(name)]
    nested = [parts for name, parts in paths if len(parts) > 2 - name.endswith("/")]
    split_folders = any(split_of(parts[0]) for parts in nested) or any(
        parts[0] in SPLITS and (len(parts) > 1 or name.endswith("/")) for name, parts in paths
    )
    images: dict[str, dict[str, list[str]]] = {}
    spelt: dict[str, str] = {}
    unread: Counter[str] = Counter()
    folder_of: dict[str, str] = {}
    others: dict[str, None] = {}
    for name, parts in paths:
        top = parts[0]
        split = split_of(top) if split_folders else "all"
        inner = list(parts[1:] if split_folders else parts)
        if split is None:
            others |= {top: None} if len(parts) > 1 or name.endswith("/") else {}
            continue
        if split_folders and folder_of.setdefault(split, top) != top:
            raise DataError(f"one folder for the split {split}", got=f"{folder_of[split]} and {top} in {place}")
        kind = None if name.endswith("/") else files.kind(store, name)
        if kind is not None and len(inner) != 2:
            raise DataError(
                "images as train/CLASS/NAME or CLASS/NAME", got=name, hint=f"splits are {', '.join(SPLITS)}"
            )
        if len(inner) > 2 - name.endswith("/"):
            unread.update([] if name.endswith("/") else [files.ending(name)])
        elif len(inner) == 2 - name.endswith("/"):
            folder = normal(inner[0])
            spelt[folder] = min(inner[0], spelt.get(folder, inner[0]))
            own = images.setdefault(split, {}).setdefault(folder, [])
            if kind is not None:
                own.append(name)
            elif not name.endswith("/"):
                unread[files.ending(name)] += 1
    return _Tree(images, spelt, unread, tuple(others))
