"""Encoded images in a folder or an LMDB of LSUN: their list and their bytes."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_tf.data.pictures import extensions, read_bytes
from diffusion_tf.errors import ConfigError, InputError
from diffusion_tf.storage.files import first_line


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """A list of encoded images.

    Attributes:
      path: the folder of the images or of the LMDB.
      is_lmdb: whether it is an LMDB.
      keys: the keys in the LMDB, decoded as latin-1, in its order; or the paths below the folder, sorted. Bytes of a
        path that are not UTF-8 are lone surrogates, as in `os.fsdecode`.
      left_out: the number of files and folders of each kind that are not in the list.
      setting: the setting that names the images, for messages: source or images.
      labels: the index of the class of each image; none without labels.
      classes: the names of the classes.
    """

    path: str
    is_lmdb: bool
    keys: list[str]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    setting: str = "source"
    labels: Sequence[int] = ()
    classes: tuple[str, ...] = ()

    def select(self, places: Sequence[int]) -> "EncodedImages":
        """Returns the images at some places of the list."""
        labels = [self.labels[place] for place in places] if self.labels else ()
        return dataclasses.replace(self, keys=[self.keys[place] for place in places], labels=labels)

    def stamps(self) -> list[str]:
        """Returns the size and time of change of each image's file, or of the LMDB: what tells old content from new."""
        paths = ["data.mdb"] if self.is_lmdb else self.keys
        return [_stamp(os.path.join(self.path, path)) for path in paths]

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], tuple[bytes, int | None]]]:
        """Opens the images; calling the result with a key reads the encoded image and the index of its class.

        Raises:
          InputError: the LMDB cannot be opened; or, when called, the image cannot be read (the message is the reason
            alone).
        """
        if not self.is_lmdb:
            labels = dict(zip(self.keys, self.labels, strict=True)) if self.labels else {}
            yield lambda key: (read_bytes(os.path.join(self.path, key)), labels.get(key))
            return
        with _open_lmdb(self.path, self.setting) as transaction:

            def read(key: str) -> tuple[bytes, int | None]:
                encoded = transaction.get(key.encode("latin-1"))
                if encoded is None:
                    raise InputError("the LMDB has lost its key: is something writing to it?")
                return encoded, None

            yield read


def find_images(source: str, limit: int | None = None, setting: str = "source") -> EncodedImages:
    """Lists the images in an LMDB's folder (with data.mdb), or in a folder and its subfolders.

    Links to folders are followed, and a folder is listed once however many links lead to it. Files of other kinds than
    pictures, and files and folders whose names begin with a dot, are left out.

    Args:
      source: the folder.
      limit: the number of images to list; default: all.
      setting: the setting that names the folder, for messages.

    Raises:
      InputError: the folder does not exist, cannot be read, or holds no images.
    """
    path = os.path.abspath(os.path.expanduser(source))
    if not os.path.isdir(path):
        what = "is a file (unpack it first)" if os.path.exists(path) else "does not exist"
        raise ConfigError(setting, f"={source} {what}: name the folder of an LMDB (with data.mdb) or of images")
    is_lmdb = os.path.exists(os.path.join(path, "data.mdb"))
    left_out: Counter[str] = Counter()
    if is_lmdb:
        with _open_lmdb(path, setting) as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False)]
            if len(keys) != (entries := transaction.stat()["entries"]):
                raise ConfigError(setting, f"={source} is damaged: {len(keys):,} of its {entries:,} images are there")
    else:
        keys = _list_folder(path, left_out, setting)
    if not keys:
        there = f"; it holds {counts(left_out)}" if left_out else ""
        raise ConfigError(
            setting, f"={source} holds no images: neither an LMDB (data.mdb) nor {', '.join(extensions())}{there}"
        )
    return EncodedImages(path, is_lmdb, keys[:limit], left_out, setting)


def counts(kinds: Mapping[str, int]) -> str:
    """Returns the number of each kind as text: "2 .txt, 1 hidden"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nothing, say, which reading reports
        return error.strerror or ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _list_folder(path: str, left_out: Counter[str], setting: str) -> list[str]:
    """The sorted paths of the pictures below a folder; counts in `left_out` what else is there."""
    folders, links, files = [path], list[str](), list[str]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        folder = (folders or links).pop()  # a folder has its own path where links lead to it too
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left_out["folder linked twice"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            names = os.listdir(folder)
        except OSError as error:
            raise ConfigError(setting, f"={path} cannot be listed ({error})") from error
        for name in sorted(names):
            entry = os.path.join(folder, name)
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out["hidden"] += 1
            elif os.path.isdir(entry):
                (links if os.path.islink(entry) else folders).append(entry)
            elif extension in extensions():
                files.append(os.path.relpath(entry, path))
            else:
                left_out[extension or "without an extension"] += 1
    return sorted(files)


@contextlib.contextmanager
def _open_lmdb(path: str, setting: str) -> Iterator[Any]:
    """Opens a read-only transaction of the LMDB in a folder."""
    try:
        import lmdb  # only LSUN's original files need it
    except ImportError as error:
        raise ConfigError(setting, f"={path} is an LMDB, and lmdb is not installed: pip install lmdb") from error
    try:
        # A lock file could not be created in a read-only folder; a name that is not UTF-8 must be bytes.
        options = {"readonly": True, "lock": False, "readahead": False}
        with lmdb.open(os.fsencode(path), **options) as database, database.begin() as transaction:
            pages, size = database.info()["last_pgno"] + 1, os.path.getsize(os.path.join(path, "data.mdb"))
            if pages * database.stat()["psize"] > size:  # reading beyond the file's end would kill the process
                raise ConfigError(
                    setting, f"={path} is truncated: data.mdb has {size:,} bytes, and {pages:,} pages: copy it again"
                )
            yield transaction
    except lmdb.Error as error:
        raise ConfigError(setting, f"={path} cannot be read as an LMDB ({first_line(error)})") from error
