"""Zip and tar archives as sources, and how those that are made to harm are refused."""

import gzip
import io
import os
import random
import resource
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.hostile_images import png_header
from helpers.random_images import Refused, WriteSource, pixels, png, read_sorted, rows_by_split

from cl_ray.data import archives
from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.errors import UserError

STORED = pixels(6, 28, 28)


FILES = {f"{'ant' if k % 2 else 'bee'}/{k}.png": png(image) for k, image in enumerate(STORED)}


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write files to an archive of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    modes: dict[str, Any] = {".tar": "w", ".tgz": "w:gz", ".gz": "w:gz", ".bz2": "w:bz2"}
    with tarfile.open(path, modes[path.suffix]) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz", "x.TAR.gz", "x.tar.bz2"])
def test_archives_of_folders(tmp_path: Path, write_source: WriteSource, name: str) -> None:
    wrapped = {f"./pets/{file}": content for file, content in FILES.items()}
    pack(tmp_path / "in" / name, wrapped)
    before = sorted(os.listdir(tmp_path / "in"))
    info, rows = write_source(tmp_path / "in")
    assert info.classes == ["ant", "bee"]
    assert np.array_equal(rows.image[..., 0], STORED)
    assert labels_of(rows).tolist() == [1, 0] * 3
    assert sorted(os.listdir(tmp_path / "in")) == before
    assert np.array_equal(write_source(tmp_path / "in" / name)[1].image, rows.image)


def test_more_archives_than_files_may_be_open(tmp_path: Path, write_source: WriteSource) -> None:
    for k in range(60):
        pack(tmp_path / "in" / f"{k:02}.zip", {"0.png": png(STORED[k % 6])})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        _, rows = write_source(tmp_path / "in")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(rows.image[..., 0], STORED[np.arange(60) % 6])


def test_splits_and_tables(tmp_path: Path, write_source: WriteSource) -> None:
    wrapped = {f"train/{file}": content for file, content in FILES.items()}
    pack(tmp_path / "in" / "train.zip", wrapped)
    pack(tmp_path / "in" / "Test.zip", dict(list(FILES.items())[:2]))
    info, rows = write_source(tmp_path / "in")
    assert rows_by_split(info) == {"train": 6, "test": 2}
    assert info.classes == ["ant", "bee"]
    test = read_sorted(Dataset.open(str(tmp_path / "made" / "set")), "test")
    assert labels_of(test).tolist() == [1, 0]
    lines = "".join(f"{k}.png,{'xyz'[k % 3]}\n" for k in range(6))
    pack(tmp_path / "inside" / "x.zip", FILES | {"labels.csv": f"file,label\n{lines}".encode()})
    pack(tmp_path / "beside" / "x.zip", FILES)
    (tmp_path / "beside" / "train.csv").write_text(f"id,class\n{lines}")
    for folder in ("inside", "beside"):
        info, rows = write_source(tmp_path / folder)
        assert info.classes == ["x", "y", "z"]
        assert labels_of(rows).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_file_beside_the_folders_of_splits(tmp_path: Path, write_source: WriteSource) -> None:
    for split in ("train", "test"):
        inside = {f"{split}/{file}": content for file, content in FILES.items()}
        pack(tmp_path / "in" / f"{split}.zip", {"README.txt": b"", **inside})
    info, _ = write_source(tmp_path / "in")
    assert info.classes == ["ant", "bee"]
    assert [info.labelled_rows(split) for split in ("train", "test")] == [6, 6]


def test_names_of_a_zip_that_does_not_say_that_they_are_unicode(
    tmp_path: Path, write_source: WriteSource
) -> None:
    pack(tmp_path / "x.zip", {f"Äpfel/{k}.png": png(STORED[k]) for k in range(2)} | FILES)
    content = (tmp_path / "x.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        flagged = [info for info in archive.infolist() if info.flag_bits & 0x800]
        assert len(flagged) == 2
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        parts = content.split(magic)
        content = magic.join([parts[0], *(clear_flag(part, offset - 4) for part in parts[1:])])
    (tmp_path / "x.zip").write_bytes(content)
    assert write_source(tmp_path / "x.zip")[0].classes == ["ant", "bee", "Äpfel"]


def clear_flag(header: bytes, offset: int) -> bytes:
    """Unset bit 11 of a header's flags, which says that the name is UTF-8."""
    (flags,) = struct.unpack_from("<H", header, offset)
    return header[:offset] + struct.pack("<H", flags & ~0x800) + header[offset + 2 :]


def test_webdataset(tmp_path: Path, write_source: WriteSource, notes: list[str]) -> None:
    for shard in range(2):
        samples: dict[str, bytes] = {}
        for k in range(3):
            samples[f"{k:03}.png"] = png(STORED[3 * shard + k])
            samples[f"{k:03}.cls"] = b"%d" % (3 * shard + k)
            samples[f"{k:03}.txt"] = b"a caption"
        pack(tmp_path / "in" / f"train-{shard:06}.tgz", samples)
    _, rows = write_source(tmp_path / "in")
    assert np.array_equal(rows.image[..., 0], STORED)
    assert labels_of(rows).tolist() == [0, 1, 2, 3, 4, 5]
    assert "Labels are from 6 .cls files beside the images." in notes
    assert "Left out, by the endings of their names: 6 .txt." in notes
    assert write_source(tmp_path / "in", label_column="none")[1].label is None


def test_webdataset_with_json(tmp_path: Path, write_source: WriteSource) -> None:
    samples: dict[str, bytes] = {}
    for k in range(3):
        samples |= {f"{k}.png": png(STORED[k]), f"{k}.json": b'{"width": 28, "label": "c%d"}' % k}
    pack(tmp_path / "in" / "0.tar", samples)
    info, _ = write_source(tmp_path / "in")
    assert info.classes == ["c0", "c1", "c2"]
    pack(tmp_path / "in" / "0.tar", samples | {"1.json": b"{}"})
    assert labels_of(write_source(tmp_path / "in")[1]).tolist() == [0, UNLABELLED, 1]


def test_names_never_lead_out_of_an_archive(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    names = ("/etc/a.png", "..\\a.png", "../../b.png", "x/../c.png", "__MACOSX/._c.png")
    pack(tmp_path / "in" / "x.zip", dict.fromkeys(names, FILES["bee/0.png"]))
    before = set(tmp_path.rglob("*"))
    assert len(write_source(tmp_path / "in", label_column="none")[1].image) == 2
    assert "Left out of archives, as hidden, thumbnails or links: 2 .., 1 __MACOSX." in notes
    assert {path for path in tmp_path.rglob("*") if "made" not in path.parts} == before


def test_later_files_replace_earlier_ones(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    pack(tmp_path / "in" / "x.tar", {f"{'./' * k}0.png": png(STORED[k]) for k in range(3)})
    assert np.array_equal(write_source(tmp_path / "in")[1].image[..., 0], STORED[2:3])
    note = "Left out of archives, as later files have the same name: x.tar/0.png, x.tar/0.png."
    assert note in notes


def test_links_in_a_tar_are_left_out(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    path = pack(tmp_path / "in" / "x.tar", FILES)
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo("bee/passwd.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    assert len(write_source(tmp_path / "in")[1].image) == 6
    assert "Left out of archives, as hidden, thumbnails or links: 1 passwd.png." in notes


def test_bombs_in_archives_are_refused_by_their_headers(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.zip", "x.tgz"):
        path = pack(tmp_path / "in" / name, {"0.png": png_header(13_300, 13_300)})
        assert "/0.png has 176,890,000 pixels, more than --max-p" in refused(tmp_path / "in")
        path.unlink()
    path = pack(tmp_path / "in" / "x.zip", {"0.png": bytes(2**23)})
    assert path.stat().st_size < 2**14
    message = refused(tmp_path / "in", max_pixels=2**20)
    assert "x.zip/0.png has 8,388,608 bytes, more than 3 for each of --max-pixels" in message
    path.unlink()
    monkeypatch.setattr(archives, "_MAX_SMALL", 2**20)
    pack(tmp_path / "in" / "x.tgz", {"0.bin": bytes(2**22), "0.png": FILES["bee/0.png"]})
    assert "or unpacks to more than 100 times its size" in refused(tmp_path / "in")
    entry = tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, 2**30
    (tmp_path / "in" / "x.tgz").write_bytes(gzip.compress(entry.tobuf() + bytes(2**20)))
    assert "(a header of 1,073,741,824 bytes)" in refused(tmp_path / "in")


def test_damaged_archives(tmp_path: Path, write_source: WriteSource, refused: Refused) -> None:
    for name in ("x.zip", "x.tar", "x.tgz"):
        path = pack(tmp_path / "in" / name, FILES)
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"nothing of the kind" * 99):
            path.write_bytes(damaged)
            message = refused(tmp_path / "in")
            assert f"{name} cannot be read as an archive (" in message
        path.unlink()
    path = pack(tmp_path / "in" / "x.tar", FILES)
    rotten = bytearray(path.read_bytes())
    rotten[1024 + 512 * (len(FILES["bee/0.png"]) // 512 + 1) - 512] ^= 255  # the second header
    path.write_bytes(rotten)
    assert "archive (it is damaged or cut at byte" in refused(tmp_path / "in")
    path = pack(tmp_path / "in" / "x.tar", FILES)
    path.write_bytes(path.read_bytes()[: 2 * (512 + 512 * (len(FILES["bee/0.png"]) // 512 + 1))])
    assert "archive (it is damaged or cut at byte" in refused(tmp_path / "in")
    path.unlink()
    path = tmp_path / "in" / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that only the checksum shows it
        for name, content in FILES.items():
            archive.writestr(name, content)
    rotten = bytearray(path.read_bytes())
    rotten[rotten.index(FILES["bee/2.png"]) + 60] ^= 1
    path.write_bytes(rotten)
    message = refused(tmp_path / "in")
    assert "x.zip/bee/2.png cannot be read as an image (Bad CRC-32 for file" in message
    assert len(write_source(tmp_path / "in", skip_broken=True)[1].image) == 5


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz", "x.npz"])
def test_any_damage_is_one_sentence(tmp_path: Path, name: str) -> None:
    chance = random.Random(0)
    path = tmp_path / "in" / name
    if name == "x.npz":
        path.parent.mkdir()
        np.savez(path, images=STORED, labels=np.arange(6))
    else:
        pack(path, FILES)
    whole = path.read_bytes()
    whole = gzip.decompress(whole) if name == "x.tgz" else whole
    sentences = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            end = chance.choice([300, len(damaged)])
            at = chance.randrange(end) if chance.random() < 0.5 else -1 - chance.randrange(end)
            damaged[at] = chance.randrange(256)
        path.write_bytes(gzip.compress(damaged) if name == "x.tgz" else damaged)
        try:
            config = SourceConfig(source=str(path), out=str(tmp_path / "out"), overwrite=True)
            write_dataset(config, note=lambda _: None)
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert all(name in sentence and len(sentence) < 1500 for sentence in sentences)


def test_packed_otherwise(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
        entry = tarfile.TarInfo("0.png")
        entry.type = tarfile.GNUTYPE_SPARSE  # the holes are left out of its bytes
        tar.addfile(entry)
    assert "x.tar/0.png is sparse: unpack it first" in refused(tmp_path / "in")
    (tmp_path / "in" / "x.tar").unlink()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("0.png", FILES["bee/0.png"])
    assert "x.zip/0.png is packed by method 14: unpack it first" in refused(tmp_path / "in")
    pack(tmp_path / "in" / "x.zip", {"a.parquet": b"x"})
    assert "x.zip/a.parquet is in an archive: unpack it first" in refused(tmp_path / "in")
    pack(tmp_path / "in" / "x.zip", FILES)
    (tmp_path / "in" / "0.png").write_bytes(FILES["bee/0.png"])
    assert "holds both 0.png and x.zip: give a folder with one" in refused(tmp_path / "in")
