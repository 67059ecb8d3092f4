"""Lists of images that the maker writes and the user may edit: rows are added, and what somebody wrote stays."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from models.runtime import write_file
from models.tables import find_columns, format_csv, format_table, parse_table, resolve_image


def guess_encoding(content: bytes) -> str:
    """Guess how a spreadsheet encoded a CSV: UTF-16 by its byte order mark, UTF-8 where its bytes are, else cp1252."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def name_in_class(cell: str) -> tuple[str, str]:
    """Name an image whatever the folder in its class: the class and the file name."""
    parts = cell.replace("\\", "/").split("/")
    return parts[0], parts[-1]


def is_untouched(row: list[str], columns: dict[str, int], header: list[str]) -> bool:
    """Tell whether a row holds all that `merge_list` writes (as label its folder's class) and nothing else."""
    others = dict(enumerate(row))
    own = {name: others.pop(columns.get(name), "").strip() for name in header}
    kind, _ = name_in_class(own["img_path"])
    is_own = all(own.values()) and own.get("actual_output", kind).lower() == kind
    return is_own and not any(cell.strip() for cell in others.values())


def read_list(path: Path) -> tuple[list[list[str]], str, bytes, str]:
    """Read a CSV that `merge_list` wrote and others may have edited: rows, delimiter, content, encoding."""
    before = path.read_bytes()
    encoding = guess_encoding(before)
    try:
        return *parse_table(before, path, encoding), before, encoding
    except ValueError as error:
        raise ValueError(f"{error}; it is left as it is: correct it, or rename it to get a new one") from None


def find_used(path: Path, header: list[str], base: Path) -> set[str]:
    """Find the images in whose rows of such a CSV, if there is one, somebody has written: their paths."""
    if not path.exists():
        return set()
    names, *rows = read_list(path)[0]
    columns = find_columns(names)
    used = [row[columns["img_path"]] for row in rows if row and not is_untouched(row, columns, header)]
    return {resolve_image(base, cell.strip()) for cell in used}


def merge_list(path: Path, header: list[str], rows: list[list[str]], base: Path) -> str:
    """List images in a CSV, which is the user's once it exists: rows are added, and those that stay keep every cell.

    A row follows its image to another folder of its class. It goes only where its image is gone and `is_untouched`.
    Delimiter, encoding and the like stay.

    Args:
        header: columns, img_path first; where the CSV lacks one, the new rows do too.
        rows: one for each image that is to be listed, text in the order of the header.
        base: the folder that img_path is relative to.

    Returns:
        A line that says what was done, and names rows that stay without an image.

    Raises:
        ValueError: the CSV cannot be read, or cannot hold the new rows. It is left as it is.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, format_csv([header, *rows]))
        return f"{path.name} lists {len(rows):,} images"
    (names, *old), delimiter, before, encoding = read_list(path)
    columns, kept, orphans = find_columns(names), [], []
    new = {resolve_image(base, row[0]): dict(zip(header, row)) for row in rows}
    unlisted, homes, followed = dict(new), {name_in_class(row[0]): row[0] for row in rows}, 0
    for row in old:
        cell = "".join(row[columns["img_path"] :][:1]).strip()
        image = resolve_image(base, cell)
        is_gone = cell and image not in new and not os.path.exists(image)
        if is_gone and (home := homes.get(name_in_class(cell))) and resolve_image(base, home) in unlisted:
            row[columns["img_path"]], image, is_gone, followed = home, resolve_image(base, home), False, followed + 1
        unlisted.pop(image, None)
        if not is_gone or not is_untouched(row, columns, header):
            kept.append(row)
            orphans += [cell] * bool(is_gone)
    added = [[cells.get(name.strip(" "), "") for name in names] for cells in unlisted.values()]
    words = f"{path.name} already lists these {len(rows):,} images"
    if added or followed or len(kept) < len(old):
        try:
            write_file(path, format_table([names, *kept, *added], delimiter, before, encoding))
        except UnicodeEncodeError:
            raise ValueError(f"{path} is {encoding}, which lacks letters of new images: re-save it as UTF-8") from None
        follow = f" ({followed:,} name the new folder of their image)" * bool(followed)
        words = f"{path.name}: {len(kept):,} rows stay as they are{follow}, {len(added):,} are added"
        words += f", {len(old) - len(kept):,} are removed, whose images are gone" * (len(kept) < len(old))
    if orphans:
        more = f" and {len(orphans) - 3:,} more" * (len(orphans) > 3)
        words += f"; {len(orphans):,} rows stay though their images are gone: {', '.join(orphans[:3])}{more}"
    return words
