"""A folder of pictures as a data set: which pictures are in a split, and their classes.

The folder may have subfolders for its splits: train, and the first that exists of test, validation and val.
Otherwise a part of the pictures is held out, chosen by a hash of their names, so that a picture stays in its split when
others come or go. The classes are the labels in `metadata.jsonl`; without them the names of the subfolders, if every
picture lies in one.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import NotRequired, TypedDict

from diffusion_tf.data.image_folders import EncodedImages, find_images
from diffusion_tf.data.partition import Label, hold_out, index_classes
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import read_file
from diffusion_tf.storage.json_files import parse_json

_TEST_NAMES = ("test", "validation", "val")
_METADATA = "metadata.jsonl"


class _Line(TypedDict):
    """A line of `metadata.jsonl`, as Hugging Face's imagefolder has it; further keys are allowed."""

    file_name: str
    label: NotRequired[Label]


def find_split(folder: str, split: str, held_out: float) -> EncodedImages:
    """Lists the pictures of a split of a folder, with their labels if they have some.

    Args:
      folder: the folder.
      split: train or test.
      held_out: the fraction of the pictures that are the test split, unless the folder has one.

    Raises:
      InputError: the folder cannot be read, has too few pictures, or its labels do not fit its pictures.
    """
    images = find_images(folder, setting="images")
    try:
        splits, depth = _splits(images, held_out)
        images = _labelled(images, splits, depth)
    except InputError as error:
        raise ConfigError("images", f"={folder}: {error}") from error
    if not splits[split]:
        raise ConfigError(
            "held_out", f"={held_out:g} leaves {folder} without a test split: its pictures are all in `split=train`"
        )
    return images.select(splits[split])


def _splits(images: EncodedImages, held_out: float) -> tuple[dict[str, list[int]], int]:
    """Returns the indices of the pictures of train and test, and the depth of the splits' own folders, 0 or 1."""
    tops = [_parents(key)[:1] for key in images.keys]
    names = {top[0].lower() if top else "" for top in tops}
    depth = int("train" in names and names <= {"train", *_TEST_NAMES} and not images.is_lmdb)

    def places(name: str) -> list[int]:
        return [place for place, top in enumerate(tops) if top and top[0].lower() == name]

    train = places("train") if depth else list(range(len(images.keys)))
    if test_name := next((name for name in _TEST_NAMES if depth and name in names), None):
        return {"train": train, "test": places(test_name)}, depth
    held = hold_out([images.keys[place] for place in train], held_out)
    return {
        "train": [place for place, out in zip(train, held, strict=True) if not out],
        "test": [place for place, out in zip(train, held, strict=True) if out],
    }, depth


def _parents(key: str) -> list[str]:
    """The names of the folders of a path."""
    return key.split(os.sep)[:-1]


def _labelled(images: EncodedImages, splits: Mapping[str, list[int]], depth: int) -> EncodedImages:
    """`images` with their labels and classes, if they have some.

    Raises:
      InputError: the labels do not fit the pictures.
    """
    used = [images.keys[place] for places in splits.values() for place in places]
    labels, num_files = _metadata_labels(images, depth)
    if missing := [key for key in used if labels and key not in labels]:
        raise InputError(f"{_METADATA} has labels for {len(labels):,} pictures, but none for {missing[0]}")
    parents = {key: _parents(key)[depth:] for key in used}
    if not labels and not images.is_lmdb and all(parents.values()):
        labels = {key: folders[0] for key, folders in parents.items()}
    left_out = dict(images.left_out)
    if num_files:
        left_out[".jsonl"] -= num_files
    images = dataclasses.replace(images, left_out={kind: count for kind, count in left_out.items() if count})
    if not labels:
        return images
    indices, classes = index_classes([labels[key] for key in used])
    index = dict(zip(used, indices, strict=True))
    return dataclasses.replace(images, labels=[index.get(key, -1) for key in images.keys], classes=classes)


def _metadata_labels(images: EncodedImages, depth: int) -> tuple[dict[str, Label], int]:
    """The labels in the metadata files of a folder and of its splits, by picture, and the number of these files."""
    folders = {"", *("".join(_parents(key)[:1]) for key in images.keys if depth)}
    files = [os.path.join(folder, _METADATA) for folder in sorted(folders)]
    files = [] if images.is_lmdb else [file for file in files if os.path.isfile(os.path.join(images.path, file))]
    keys, labels = set(images.keys), dict[str, Label]()
    for file in files:
        for place, line in _lines(os.path.join(images.path, file)):
            key = os.path.normpath(os.path.join(os.path.dirname(file), line["file_name"]))
            if key not in keys:
                raise InputError(f"{place} names {key}, which is not a picture there")
            if "label" in line:
                labels[key] = line["label"]
    return labels, len(files)


def _lines(path: str) -> Iterator[tuple[str, _Line]]:
    """Yields each line of a metadata file with its place, for messages."""
    for number, text in enumerate(read_file(path).splitlines(), 1):
        if text.strip():
            place = f"{path}, line {number},"
            yield place, parse_json(text, _Line, place)
