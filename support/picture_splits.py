"""Splits: which records train, which validate and which test, so that no picture is in two splits.

A record without "split" gets the split that other records give its question's picture, else one by
the hash of the picture's pixels (8 : 1 : 1). The pixels count and not the file: the same picture,
compressed otherwise or under another name, stays on its side.
"""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.files import whole
from support.images import file_version, open_image, picture_digest
from support.processes import progress

SPLITS = ("train", "validation", "test")


def give_splits(named: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """(N,) int8, a split for each record, as an index in SPLITS.

    named: (N,) int8, the split that each record names; -1: none. pictures: (N,) uint64, a hash of
    its question's picture.
    """
    distinct, picture_of = np.unique(pictures, return_inverse=True)  # (P,), (N,)
    splits_of = np.zeros(len(distinct), np.int8)  # bit s: a record of the picture names split s
    for code in range(len(SPLITS)):
        splits_of[picture_of[named == code]] |= 1 << code
    by_hash = np.select([distinct % 10 == 0, distinct % 10 == 1], [2, 1], 0)
    # pictures with one named split keep to it; with several there is no right one
    inherited = np.select([splits_of == 1, splits_of == 2, splits_of == 4], [0, 1, 2], by_hash)
    return np.where(named < 0, inherited[picture_of], named).astype(np.int8)


def shared_pictures(file: Path, splits: np.ndarray, pictures: np.ndarray) -> list[str]:
    """A sentence for each two splits of a file of records that share pictures. (N,), (N,)"""
    distinct = [np.unique(pictures[splits == code]) for code in range(len(SPLITS))]
    sentences = []
    for one, other in itertools.combinations(range(len(SPLITS)), 2):
        if shared := len(np.intersect1d(distinct[one], distinct[other])):
            sentences.append(f"{file}: {shared} of {len(distinct[other])} {SPLITS[other]} images "
                             f"are also in {SPLITS[one]}; give all records of an image one split")
    return sentences


def pixel_hashes(records, cache: Path | None, problems: list[str] | None) -> np.ndarray:
    """(N,) uint64, a hash of the pixels of each question's picture. Every file is read once.

    records: support.records.Records. cache: a file that keeps the hashes; a picture of the same
    size and time is not read again, also after an interruption. One process at a time writes it.
    problems: gets an error for each picture that cannot be read; None: the first one is raised.
    """
    try:
        known = dict(np.load(cache).tolist()) if cache and cache.is_file() else {}
    except (ValueError, EOFError):
        raise ValueError(f"{cache} is not a cache of pictures' hashes; delete it") from None

    def hash_of(row: int) -> int:
        try:
            file = records[row].image
            version = short_hash(repr(file_version(file)).encode())
            if version not in known:
                pixels = picture_digest(open_image(file, records.where(row)))
                known[version] = int(pixels[:16], 16)
            return known[version]
        except (ValueError, OSError) as error:
            if problems is None:
                raise
            problems.append(str(error))
            return 0

    before = len(known)
    # one row for each name
    _, first, name_of = np.unique(records.table["picture"], return_index=True, return_inverse=True)
    hashes = np.zeros(len(first), np.uint64)
    # in the order of the file, and not all at once: a waiting call takes more memory than a result
    parts = np.array_split(np.argsort(first), len(first) // 100 + 1)
    try:
        # threads are enough: Pillow decodes, and hashlib hashes, without Python's lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in progress(parts, "reading images, by the hundred"):
                hashes[part] = np.fromiter(pool.map(hash_of, first[part].tolist()), np.uint64)
    finally:
        if cache and len(known) > before:
            with whole(cache) as partial, open(partial, "wb") as file:
                np.save(file, np.array(list(known.items()), np.uint64))
    return hashes[name_of]


def short_hash(content: bytes) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
