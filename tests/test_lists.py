"""Lists of images that the user may edit: rows are added, and what somebody wrote stays."""

import pytest
from conftest import read_csv, write_csv

from models import lists

HEADER = ["img_path", "recording", "start_s"]


def merge(folder, *names):
    """Make images of these names exist, and list them in unknown.csv."""
    (folder / "data/unknown").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "data/unknown" / name).write_bytes(b"")
    rows = [[f"unknown/{name}", name.partition("_")[0], "0"] for name in names]
    return lists.merge_list(folder / "test_data/unknown.csv", HEADER, rows, folder / "data")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize(("delimiter", "newline"), [(",", "\n"), (";", "\r\n"), ("\t", "\r\n")])
@pytest.mark.parametrize("hint", [False, True])
def test_new_images_are_added_to_a_list_and_all_that_is_in_it_stays(tmp_path, encoding, delimiter, newline, hint):
    table = tmp_path / "test_data/unknown.csv"
    assert merge(tmp_path, "a.png", "ü.png") == "unknown.csv lists 2 images"
    lines = [
        "recording,img_path,start_s,predicted_output,Größe",
        "a,unknown/a.png,0,Original,007",
        "",
        "x,unknown\\ü.png,,,",
    ]
    lines = [line.replace(",", delimiter) for line in [f"sep={delimiter}"] * hint + lines]
    before = (newline.join(lines) + newline).encode(encoding)
    table.write_bytes(before)
    assert merge(tmp_path, "a.png", "ü.png") == "unknown.csv already lists these 2 images"
    assert table.read_bytes() == before
    assert merge(tmp_path, "ü.png", "ö.png", "a.png") == "unknown.csv: 3 rows stay as they are, 1 are added"
    added = "ö.png,unknown/ö.png,0,,".replace(",", delimiter) + newline
    assert table.read_bytes().decode(encoding) == before.decode(encoding) + added


def test_row_follows_its_image_to_another_folder(tmp_path):
    header, table = ["img_path", "actual_output"], tmp_path / "test_own.csv"
    write_csv(table, [[*header, "note"], ["original/a.png", "Original", "mine"]])
    words = lists.merge_list(table, header, [["original/s/a.png", "Original"]], tmp_path)
    assert read_csv(table) == [{"img_path": "original/s/a.png", "actual_output": "Original", "note": "mine"}]
    assert "1 name the new folder of their image" in words
    lists.merge_list(table, header, [["deepfake/s/a.png", "Deepfake"]], tmp_path)
    rows = [list(row.values()) for row in read_csv(table)]
    assert rows == [["original/s/a.png", "Original", "mine"], ["deepfake/s/a.png", "Deepfake", ""]]


@pytest.mark.parametrize(
    ("row", "goes"),
    [
        ("unknown/gone.png,gone,1.8,,,", True),
        ("unknown/gone.png,gone,1.8,Deepfake,0.9,", False),
        ("unknown/gone.png,gone,1.8,,,mine", False),
        ("unknown/gone.png,gone,1.8,,,,surplus", False),
        ("unknown/gone.png,,,,,", False),  # the maker leaves none of its columns blank
        ("../elsewhere.png,gone,1.8,,,", False),
    ],
)
def test_row_of_an_image_that_is_gone_goes_only_if_nothing_in_it_is_the_users(tmp_path, row, goes):
    (tmp_path / "elsewhere.png").write_bytes(b"")
    header, table = (
        "img_path,recording,start_s,predicted_output,deepfake_score,note",
        tmp_path / "test_data/unknown.csv",
    )
    table.parent.mkdir()
    table.write_text(f"{header}\n{row}\n")
    words = merge(tmp_path, "a.png")
    assert table.read_text() == f"{header}\n" + f"{row}\n" * (not goes) + "unknown/a.png,a.png,0,,,\n"
    assert ("1 are removed, whose images are gone" in words) == goes
    is_named = "1 rows stay though their images are gone: unknown/gone.png" in words
    assert is_named == (not goes and "elsewhere" not in row)


def test_corrected_label_of_an_image_that_is_gone_stays(tmp_path):
    header, table = ["img_path", "actual_output"], tmp_path / "test_own.csv"
    rows = [["original/a.png", "Original"], ["original/b.png", "Deepfake"], ["deepfake/c.png", "Deepfake"]]
    write_csv(table, [header, *rows])
    lists.merge_list(table, header, [["original/d.png", "Original"]], tmp_path)
    assert [row["img_path"] for row in read_csv(table)] == ["original/b.png", "original/d.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"image,note\na.png,mine\n", "has no column img_path; columns found: 'image', 'note'"),
        (b'img_path,note\nunknown/x.png,"never closed\n', "unbalanced quotes?"),
        (b"PK\x03\x04\xff", "is an Excel workbook, not a CSV"),
        ("img_path;Größe\n".encode("cp1252"), "is cp1252, which lacks letters of new images: re-save it as UTF-8"),
    ],
)
def test_list_that_cannot_be_read_is_refused_and_not_overwritten(tmp_path, content, words):
    table = tmp_path / "test_data/unknown.csv"
    table.parent.mkdir()
    table.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        merge(tmp_path, "й.png")
    assert words in str(caught.value) and str(table) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert table.read_bytes() == content
