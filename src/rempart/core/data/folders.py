"""Class folders of image files, in a folder or a zip archive."""

import itertools
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch

from rempart.core import files
from rempart.core.data.modifiers import Modifiers
from rempart.core.data.reading import of_files
from rempart.core.data.samples import SPLITS, Data, choose
from rempart.core.errors import DataError


def class_folders(path: Path, split: str, modifiers: Modifiers) -> Data:
    """Images sorted into folders by class, and these into folders by split, or not."""
    store = files.Folder(path) if path.is_dir() else files.open_zip(path)
    tree = _tree(store, store.names())
    split = "all" if "all" in tree else split
    if not tree:
        raise DataError(
            "class folders of images",
            got=f"none in {path.name}",
            hint=f"images are {' '.join((*files.SUFFIXES, *files.VOLUMES))}",
        )
    choose(split, [name for name in (*SPLITS, "all") if name in tree], f"{path.name}, as folders,")
    class_names = tuple(sorted(tree[split]))
    for name, classes in tree.items():
        if odd := sorted(classes.keys() ^ set(class_names)):
            came = "; ".join(f"{c} only in {name if c in classes else split}" for c in odd)
            raise DataError(f"the same classes in {name} and {split}", got=came)
    if empty := [name for name in class_names if not tree[split][name]]:
        raise DataError("images in every class folder", got=f"none in {', '.join(empty)} of {split} in {path.name}")
    if len(class_names) < 2:
        raise DataError("two or more class folders", got=f"{', '.join(class_names)} in {path.name}")

    labels = {name: k for k, class_name in enumerate(class_names) for name in tree[split][class_name]}
    names = tuple(sorted(labels, key=files.order))
    reference = next(tree[name] for name in (*SPLITS, "all") if any(tree.get(name, {}).values()))
    first = min(itertools.chain(*reference.values()), key=files.order)  # the same one for every split
    numbers = torch.tensor([labels[name] for name in names])
    masks = None if modifiers.mask is None else _masks(path.parent / modifiers.mask, names)
    return of_files(store, names, numbers, split, class_names, modifiers, first=first, masks=masks)


def _masks(root: Path, names: Iterable[str]) -> tuple[files.Folder, list[str]]:
    """The masks that lie in a folder of their own under the names of the images, but for the ending."""
    found: list[str] = []
    for name in names:
        ending = next((e for e in (".nii.gz", *files.VOLUMES, *files.SUFFIXES) if name.lower().endswith(e)), "")
        bare = name[: len(name) - len(ending)]
        these = [bare + ending for ending in (".png", ".nii.gz", ".nii") if (root / (bare + ending)).is_file()]
        if len(these) != 1:
            raise DataError(f"one mask in {root.name}, a .png, .nii.gz or .nii", got=f"{len(these)} for {name}")
        found.append(these[0])
    return files.Folder(root, closed=True), found


def _tree(store: files.Store, names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The image names by split and class; one split `all` where no folder is named like a split."""
    paths = [(name, PurePosixPath(name).parts) for name in names]
    paths = [(n, p) for n, p in paths if p and not any(q.startswith(".") or q == "__MACOSX" for q in p)]
    split_folders = any(parts[0] in SPLITS and (len(parts) > 1 or name.endswith("/")) for name, parts in paths)
    tree: dict[str, dict[str, list[str]]] = {}
    for name, parts in paths:
        split, inner = (parts[0], parts[1:]) if split_folders else ("all", parts)
        if split_folders and split not in SPLITS:
            continue
        if name.endswith("/"):
            if len(inner) == 1:
                tree.setdefault(split, {}).setdefault(inner[0], [])
        elif files.kind(store, name):
            if len(inner) != 2:
                raise DataError(
                    "images as train/CLASS/NAME or CLASS/NAME", got=name, hint=f"splits are {', '.join(SPLITS)}"
                )
            tree.setdefault(split, {}).setdefault(inner[0], []).append(name)
    return tree
