"""Find the labels of images in tables beside them or in a file beside each, and their classes.

Tables are CSV and TSV files with a header, JSON Lines (Hugging Face's `metadata.jsonl`), and
StyleGAN's `dataset.json`. A WebDataset has a file `key.cls` or `key.json` for each image `key.jpg`.
"""

import codecs
import csv
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Set
from typing import Any

from cl_ray.data.dataset import INFO_FILE, MAX_CLASSES
from cl_ray.data.file_tree import FileTree, Note, ending, listed
from cl_ray.data.source_config import FILE_COLUMNS, LABEL_COLUMNS, SourceConfig
from cl_ray.errors import UserError, first_error_line, pluralize

LabelValue = int | str | None
"""What a source has as a label; None is no label."""

_NO_LABEL = -1
"""Means no label among whole numbers, as in torchvision and scikit-learn."""
_TABLES = (".csv", ".tsv", ".jsonl")
_SIDECARS = (".cls", ".json")
"""Files of one image's label."""
_MAX_BYTES, _MAX_SIDECAR = 2**30, 2**20
"""Of a table, and of one image's label."""
_NUMBER = re.compile(r"(-?\d{1,18})(\.0*)?")
_FORM = re.compile(r"(^|[^a-z])submission", re.IGNORECASE)
"""A table of answers to give, as Kaggle's sample_submission.csv: its labels are placeholders."""
_WITHOUT = "leave the labels out with `--label-column none`"


def check_class_count(count: int, location: str, column: str) -> None:
    """Check the number of different labels.

    Raises:
        UserError: There are too many.
    """
    if count > MAX_CLASSES:
        raise UserError(
            f"{location} holds more than {MAX_CLASSES:,} different values in {column}, which are "
            "no classes: name another with `--label-column`, or `none`."
        )


def find_classes(
    values: Set[LabelValue],
    column: str,
    note: Note,
    known: list[str] | None = None,
    is_numbered: bool = False,
) -> tuple[list[str] | None, dict[LabelValue, int]]:
    """Return the names of the classes, None if they are numbers, and the class of each value.

    Values without a class have no label.

    Args:
        values: All different labels.
        column: What `note` calls their place.
        note: Called with a sentence if a number means no label.
        known: The names of the classes 0, 1, ..., if the source says them.
        is_numbered: Whether whole numbers are classes, whatever they are.
    """
    labels = set(values) - {None}
    if _NO_LABEL in labels and (known or labels != {_NO_LABEL, 1}):
        labels.remove(_NO_LABEL)
        note(f"The number {_NO_LABEL} in {column} means an image without a label.")
    numbers: dict[LabelValue, int] = {label: label for label in labels if isinstance(label, int)}
    is_numbered = is_numbered or known is not None or labels == set(range(len(labels)))
    if is_numbered and len(numbers) == len(labels):
        return known and [_encodable(name) for name in known], numbers
    ordered = sorted(labels, key=lambda value: (isinstance(value, str), value))
    return [_encodable(str(value)) for value in ordered], {v: k for k, v in enumerate(ordered)}


def _encodable(name: str) -> str:
    """Return a name with surrogates escaped, which JSON and archives may hold and UTF-8 cannot."""
    return name.encode(errors="backslashreplace").decode()


class _UnusableError(Exception):
    """Why a table gives no labels, as the end of a sentence."""


class _NoLabelsError(_UnusableError):
    """A table says that there are no labels."""


def find_label_files(tree: FileTree, images: list[str]) -> list[str]:
    """Return the files that may hold labels of the images: tables, and files named like these."""
    found = [file for file in tree.sizes if _is_table(file) or ending(file) in _SIDECARS]
    names = {name for image in images for name in _sidecar_names(image)} if found else set()
    return [file for file in found if _is_table(file) or posixpath.splitext(file)[0] in names]


def _is_table(file: str) -> bool:
    return ending(file) in _TABLES or posixpath.basename(file) == INFO_FILE


def _sidecar_names(image: str) -> Iterator[str]:
    """Yield what a file beside an image may be called, without its own ending, likelier ones first.

    The last is what WebDataset calls the key of a sample: its path up to the first dot of its name.
    """
    folder, name = posixpath.split(image)
    yield from (image, posixpath.splitext(image)[0])
    yield posixpath.join(folder, name.partition(".")[0])


def read_label_files(
    tree: FileTree, files: list[str], images: list[str], config: SourceConfig, note: Note
) -> dict[str, LabelValue] | None:
    """Read the labels of image files from the files beside them.

    Rows of a table name files relative to it. A name that leads nowhere stands for the only image
    of that name in any folder, and without an ending for the only one that is called so.

    Args:
        tree: The files of the source.
        files: Those of `find_label_files`.
        images: The image files among them.
        config: Its `file_column` and `label_column`; None is one of FILE_COLUMNS, LABEL_COLUMNS.
        note: Called with a sentence on all tables and sidecars, and on rows without a file.

    Returns:
        The labels of images that have one, which is empty where a file says that there are none;
        None if no file says anything.

    Raises:
        UserError: An image has two labels, labels are no classes, or no table has the columns that
            were named.
    """
    named = " and ".join(
        f"--{kind}-column {column}"
        for kind, column in (("file", config.file_column), ("label", config.label_column))
        if column
    )
    labels = _read_sidecars(tree, files, images, config.label_column, note)
    exact = {_composed(image): image for image in images} if files else {}
    by_name = _by_bare_name(images) if files else {}
    has_table, says_none, unusable = False, False, dict[str, str]()
    for file in filter(_is_table, files):
        if _FORM.search(posixpath.basename(file)):
            unusable[file] = "is a form for answers, by its name"
            continue
        try:
            columns, rows = _read_table(tree, file, config)
            has_table = True
            found = _match(f"{tree.location}/{file}", file, rows, exact, by_name, note)
        except _UnusableError as error:
            unusable[file] = str(error)
            says_none = says_none or isinstance(error, _NoLabelsError)
            continue
        for image, label in found.items():
            if labels.setdefault(image, label) != label:
                raise UserError(
                    f"{tree.location}/{image} has the labels {labels[image]} and {label} (in "
                    f"{file}): keep one, or {_WITHOUT}."
                )
        note(f"Labels are from {file}, columns {' and '.join(columns)}.")
    if named and not has_table and not labels:
        reasons = [f"{file} {reason}" for file, reason in unusable.items()]
        raise UserError(
            f"{tree.location} has no table with {named} ({listed(reasons) or 'it has none'}): "
            "leave the flag out or name another column."
        )
    for file, reason in unusable.items():
        note(f"Not used for labels: {file} {reason}.")
    if not labels:
        return {} if says_none else None
    check_class_count(len(set(labels.values())), tree.location, "the labels beside its images")
    without = [file for file in images if file not in labels]
    if without:
        have = "has" if len(without) == 1 else "have"
        note(f"{len(without):,} of {len(images):,} images {have} no label: {listed(without, 3)}.")
    return labels


def _read_sidecars(
    tree: FileTree, files: list[str], images: list[str], label_column: str | None, note: Note
) -> dict[str, LabelValue]:
    """Return the labels of images that have a file of their own for it."""
    labels: dict[str, LabelValue] = {}
    for kind in reversed(_SIDECARS) if label_column else _SIDECARS:
        sidecars = [file for file in files if ending(file) == kind and not _is_table(file)]
        if not sidecars:
            continue
        count = pluralize(len(sidecars), f"{kind} file")
        by_name: dict[str, LabelValue] = {}
        if not labels:
            by_name = {
                posixpath.splitext(file)[0]: _sidecar_label(tree, file, label_column)
                for file in sidecars
            }
        used = any(label is not None for label in by_name.values())
        for image in images if used else ():
            name = next((name for name in _sidecar_names(image) if name in by_name), None)
            if name is not None and (label := by_name[name]) is not None:
                labels[image] = label
        note(f"{'Labels are from' if used else 'Not used for labels:'} {count} beside the images.")
    return labels


def _sidecar_label(tree: FileTree, file: str, label_column: str | None) -> LabelValue:
    if tree.sizes[file] > _MAX_SIDECAR:
        return None
    try:
        text = tree.read(file).decode("utf-8-sig")
        if ending(file) == ".cls":
            return _as_label(text)
        record = json.loads(text)
        label = record[_choose_column(list(record), label_column, LABEL_COLUMNS, "label")]
    except UserError:
        raise
    except Exception:  # as in `_read_table`; the image has no label
        return None
    return _as_label(label) if isinstance(label, str | int | float) else None


def _read_table(
    tree: FileTree, file: str, config: SourceConfig
) -> tuple[tuple[str, str], list[tuple[str, Any]]]:
    """Return the names of the two columns of a table, and a file's name and label of each row."""
    if tree.sizes[file] > _MAX_BYTES:
        raise _UnusableError(f"has more than {_MAX_BYTES:,} bytes")
    try:
        data = tree.read(file)
        text = io.TextIOWrapper(io.BytesIO(data), _encoding(data), newline="")
        rows: Iterable[dict[str, Any]]  # read one by one, so that the other columns take no memory
        if ending(file) == ".json":
            columns, rows = ["file", "label"], _stylegan_rows(json.load(text))
        elif ending(file) == ".jsonl":
            columns = list(json.loads(next(filter(str.strip, text), "{}")))
            text.seek(0)
            rows = map(json.loads, filter(str.strip, text))
        else:
            delimiter = max(",;\t", key=text.readline().count)
            text.seek(0)
            rows = csv.DictReader(text, delimiter=delimiter)
            columns = list(rows.fieldnames or [])
        names = _choose_column(columns, config.file_column, FILE_COLUMNS, "file")
        labels = _choose_column(columns, config.label_column, LABEL_COLUMNS, "label")
        pairs = [(str(row[names]), row.get(labels)) for row in rows]
    except (UserError, _UnusableError):
        raise
    except Exception as error:  # of csv and json, of rows of other types, of a damaged archive
        raise _UnusableError(f"is no such table ({first_error_line(error)})") from error
    if not pairs:
        raise _UnusableError("has no rows")
    for name, label in pairs:
        if not isinstance(label, str | int | float | None):
            raise UserError(
                f"{tree.location}/{file} has the label {label!r} for {name}, which is no class: "
                f"name another column with `--label-column`, or {_WITHOUT}."
            )
    return (names, labels), pairs


def _encoding(data: bytes) -> str:
    """Return UTF-8, or what Excel writes: UTF-16 or Windows' Western code page."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _stylegan_rows(record: Any) -> list[dict[str, Any]]:
    """Return the rows of StyleGAN's dataset.json: {"labels": [[file, class], ...]} or null."""
    if record["labels"] is None:
        raise _NoLabelsError("says that there are no labels")
    return [{"file": file, "label": label} for file, label in record["labels"]]


def _choose_column(columns: list[str], given: str | None, usual: tuple[str, ...], kind: str) -> str:
    if given is not None:
        if given not in columns:
            raise _UnusableError(f"has no column {given} but {listed(columns)}")
        return given
    by_name = {re.sub(r"[\s-]+", "_", c.strip().lower()): c for c in reversed(columns)}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None:
        raise _UnusableError(
            f"has no {kind} column of a usual name but {listed(columns)} (name it with "
            f"`--{kind}-column`)"
        )
    return found


def _by_bare_name(images: list[str]) -> dict[str, str | None]:
    """Return images by their names, with and without ending; None where several have one."""
    found: dict[str, str | None] = {}
    for file in images:
        bare = _composed(posixpath.basename(file))
        for name in {bare, posixpath.splitext(bare)[0]}:
            found[name] = None if name in found else file
    return found


def _match(
    location: str,
    table: str,
    rows: list[tuple[str, Any]],
    exact: dict[str, str],
    by_name: dict[str, str | None],
    note: Note,
) -> dict[str, LabelValue]:
    """Return the labels that a table gives to images; rows without a label are left out."""
    folder = posixpath.dirname(table)
    labels: dict[str, LabelValue] = {}
    absent: list[str] = []
    found: list[tuple[str, Any]] = []
    loose: list[tuple[str, Any]] = []
    for name, label in rows:
        path = posixpath.normpath(posixpath.join(folder, name.strip().replace("\\", "/")))
        image = exact.get(_composed(path))
        (loose if image is None else found).append((image or path, label))
    named = {path for path, _ in found}
    for path, label in loose:
        image = by_name.get(_composed(posixpath.basename(path)))
        if image is None or image in named:
            absent.append(path)
        else:
            found.append((image, label))
    for file, label in found:
        value = _as_label(label)
        if value is not None and labels.setdefault(file, value) != value:
            raise UserError(
                f"{location} gives {file} the labels {labels[file]} and "
                f"{value}: keep one, or {_WITHOUT}."
            )
    if absent and found:
        note(
            f"Not used for labels: {pluralize(len(absent), 'row')} of {table}, without an image "
            f"({absent[0]})."
        )
    if not labels:
        raise _UnusableError(f"names none of the images, but {rows[0][0]!r}")
    return labels


def _composed(name: str) -> str:
    """Return a name as most systems write it: macOS writes an accent as a character of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _as_label(value: str | int | float | None) -> LabelValue:
    """Return a number or a name; None where there is none, as NaN."""
    text = "" if value is None else str(value).strip()
    if text.lower() == "nan":
        return None
    if number := _NUMBER.fullmatch(text):
        return int(number[1])
    return text or None
