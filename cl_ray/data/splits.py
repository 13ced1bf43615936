"""Which split and class files belong to, by the names of their folders and their own."""

import re
from typing import Literal

from cl_ray.data.file_tree import FileTree
from cl_ray.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "test": "test",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
}
"""Names of splits in a source, in lower case, and their names here (these first, in order)."""
SplitChoice = Literal["auto", "none"]
"""Whether names of files and folders can be splits."""

_SPLIT_NAME = re.compile(
    rf"(?:split=)?({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


def find_file_splits(
    location: str, files: list[str], split_choice: SplitChoice
) -> dict[str, list[str]]:
    """Group files by the first of their folders, or their own name, that begins with a split's.

    Raises:
        UserError: Only some files name a split, or none names the training split.
    """
    splits: dict[str, list[str]] = {}
    for file in files if split_choice == "auto" else ():
        matches = (_SPLIT_NAME.match(part) for part in file.split("/"))
        split = next((SPLIT_NAMES[match[1].lower()] for match in matches if match), "")
        splits.setdefault(split, []).append(file)
    if set(splits) <= {""}:
        return {"train": files}
    check_file_splits(location, splits)
    return splits


def check_file_splits(location: str, splits: dict[str, list[str]]) -> None:
    """Check that there is a training split, and that all files are in a split.

    Args:
        location: What error messages call the source.
        splits: The files of each split; "" holds those of none.

    Raises:
        UserError: There is none, or a file is in none.
    """
    way_out = "add `--splits none` if all are training images"
    if "" in splits:
        raise UserError(
            f"{location} has files of named splits ({', '.join(s for s in splits if s)}), but "
            f"{splits[''][0]} names none: rename it to train-*, move it away, or {way_out}."
        )
    if "train" not in splits:
        raise UserError(
            f"{location} has no training split but only {', '.join(splits)}: rename its files to "
            f"train-*, or {way_out}."
        )


def find_folder_splits(
    tree: FileTree, files: list[str], splits: SplitChoice
) -> dict[str, list[tuple[str, str | None]]]:
    """Return the files of each split, with the class of each or None, by their folders.

    If the top folders have the names of splits, they are splits. The next folder is the class,
    and deeper ones belong to it. A folder that holds all others is neither.

    Raises:
        UserError: Only some folders have the names of splits, or none is the training split.
    """
    folders = _without_common([tree.folders(file) for file in files], splits)
    tops = [inside[0] if inside else "" for inside in folders]
    named = {top: SPLIT_NAMES[top.lower()] for top in set(tops) if _is_split(top, splits)}
    way_out = "add `--splits none` if its folders are classes"
    outside = next((f for f, top in zip(files, tops, strict=True) if top not in named), None)
    if named and outside is not None:
        raise UserError(
            f"{tree.location} has the folder {min(named)}, which is the name of a split, but "
            f"{outside} is in no split ({', '.join(SPLIT_NAMES)}): move it into one, or {way_out}."
        )
    if named and "train" not in named.values():
        raise UserError(
            f"{tree.location} has no training split but only {', '.join(sorted(named))}: rename a "
            f"folder to train, or {way_out}."
        )
    if named:
        folders = _without_common([inside[1:] for inside in folders], "none")
    found: dict[str, list[tuple[str, str | None]]] = {}
    for file, top, inside in zip(files, tops, folders, strict=True):
        entry = (file, inside[0] if inside else None)
        found.setdefault(named.get(top, "train"), []).append(entry)
    return found


def _without_common(folders: list[list[str]], splits: SplitChoice) -> list[list[str]]:
    """Leave out the top folders that hold nothing but folders, and all of them."""
    while all(len(inside) > 1 for inside in folders) and len({f[0] for f in folders}) == 1:
        if _is_split(folders[0][0], splits):
            break
        folders = [inside[1:] for inside in folders]
    return folders


def _is_split(folder: str, splits: SplitChoice) -> bool:
    return splits == "auto" and folder.lower() in SPLIT_NAMES
