"""A copy of the artifacts in an object store (S3, GCS, Azure: what fsspec opens), for machines without a shared disk.

    artifact that was committed here -> send() -> <url>/<kind>/<key[:16]>/<digest of its files>/<file>
                                                  <url>/<kind>/<key[:16]>/manifest.json   last, in one request
    artifact that is not here        -> fetch() -> a folder aside, each digest checked; the store puts it into its place

An object store has no locks and no rename. So files lie below a name made of their own digests: what a killed run
sent is gone on with, and two machines that made the same artifact with other bits never mix. The first manifest
counts, for both.

Ring: edge (network, disk).  Units: bytes.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from tasks import files
from tasks.environment import holds_login
from tasks.errors import (
    CorruptError,
    MissingError,
    SpecError,
    TataraError,
    TransientError,
)
from tasks.remote_errors import translate_error
from tasks.remote_manifest import MANIFEST, NOTE, Json, parse_manifest, relocate, without_ours

_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "r2"}  # and with a PUT that is whole
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
logger = logging.getLogger(__name__)


class Remote:
    """The artifacts below one URL."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:  # Any: what the file system takes
        """Open a file system; nothing is asked of it yet.

        Args:
            url: `s3://bucket/prefix` or another URL that fsspec knows.
            options: of the file system (`key`, `secret`, `endpoint_url` of s3fs); without them its own variables count.
        Raises: SpecError (a URL with a password, or of no known kind), MissingError (its package is not installed).
        """
        self.protocol, rest = urlsplit(url).scheme, url.partition("://")[2]
        if holds_login(url) or ("@" in url and "://" not in url):  # first: what is said next shows it
            raise SpecError(
                "the remote storage's URL holds a login: put it into the block's options, or the environment"
            )
        if not self.protocol or not rest.strip("/"):
            raise SpecError(f"the remote storage is {url!r}, expected a URL like s3://bucket/prefix")
        if any(mark in rest for mark in "*?["):
            raise SpecError("the remote storage's URL has *, ? or [, which fsspec takes for a pattern: leave them out")
        self.url = url.rstrip("/")
        self._peeked: dict[str, Json] = {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **(options or {}))
        except ImportError as error:
            package = _PACKAGES.get(self.protocol, "the package that fsspec names")
            raise MissingError(f"{self.url} needs {package}: install it beside Tatara ({error})") from error
        except (ValueError, TypeError) as error:
            raise SpecError(f"the remote storage {self.url} can't be opened: {error}") from error

    def check(self) -> str:
        """Write, read and remove a small file; return one line that says so. Raises as `send` does."""
        probe = f"{self._root}/.probe-{uuid.uuid4().hex}"
        with self._errors("writing a probe to"):
            self._make_parent(probe)
            self._fs.pipe_file(probe, b"tatara")
            read = self._fs.cat_file(probe)
            self._fs.rm_file(probe)
        if read != b"tatara":
            raise CorruptError(f"{self.url} answers {read[:20]!r} for what was just written as b'tatara'")
        return f"remote storage: {self.url} takes and returns files"

    def read(self, place: str) -> Json | None:
        """Return the manifest of what is whole at `kind/key[:16]`, None when nothing is."""
        with self._errors("reading"):
            self._fs.invalidate_cache()
            try:
                data = self._fs.cat_file(f"{self._root}/{place}/{MANIFEST}")
            except FileNotFoundError:
                return None
        return self._parse(place, data)

    def peek(self, place: str) -> Json | None:
        """Return what `read` or `read_all` found there before, else `read` it: enough to choose by, not to fetch by."""
        if place not in self._peeked and (found := self.read(place)):
            self._peeked[place] = found
        return self._peeked.get(place)

    def read_all(self, kind: str) -> list[Json]:
        """Return the manifests of every whole artifact of a kind."""
        with self._errors("listing"):
            self._fs.invalidate_cache()
            try:
                places = self._fs.ls(f"{self._root}/{kind}", detail=False)
            except FileNotFoundError:
                return []
            found: list[Json] = []
            names = [PurePosixPath(place).name for place in places]
            for name, read in zip(names, self._read_many([f"{kind}/{name}" for name in names]), strict=True):
                if isinstance(read, bytes):
                    found.append(self._parse(f"{kind}/{name}", read))
                    self._peeked[f"{kind}/{name}"] = found[-1]
                elif not isinstance(read, FileNotFoundError):  # that one is not whole; all else would hide one that is
                    raise read
        return found

    def send(self, folder: Path, manifest: Json, root: Path) -> Json | None:
        """Copy a committed artifact, where it is not there yet; return the manifest of another machine's that is.

        Args:
            folder: the artifact's folder, `<root>/<kind>/<key[:16]>`.
            manifest: its manifest.
            root: the store's root, from which paths in the manifest are told again elsewhere.
        Raises: MissingError (no such bucket), TransientError.
        """
        place = folder.relative_to(root).as_posix()
        there = self.read(place)
        if there and self._is_noted(folder, there):  # asked each time: what was removed there is sent again
            return None
        digests = {name: files.digest(folder / name) for name in manifest["files"]}
        aside = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
        if there is None:
            logger.info("sending %s (%.2f GB) to %s", place, sum(manifest["files"].values()) / 1e9, self.url)
            with self._errors("sending to"):
                for name, size in manifest["files"].items():
                    self._send_file(folder / name, f"{self._root}/{place}/{aside}/{name}", size)
                whole = {**manifest, "root": str(root), "digests": digests, "aside": aside}
                self._announce(place, json.dumps(whole, ensure_ascii=False).encode())
            there = self.read(place)
        if there is None:
            raise TransientError(f"{self.url}/{place} was sent but is not there: something removes files below it")
        if there["aside"] != aside:
            return there
        self.note(folder, there)
        return None

    def fetch(self, place: str, manifest: Json, root: Path) -> Path | None:
        """Bring the artifact at `kind/key[:16]` into a folder aside, whole; return that, None when its model lacks.

        Paths below the root of the machine that made it are changed to ours; a model elsewhere that is not here makes
        it as good as absent. What a killed run brought is gone on with.
        Raises: CapacityError (disk), CorruptError (a file is not what its digest says), and as `send`.
        """
        artifact = self.fields(manifest, root)
        model = artifact.get("model_folder", "")
        if model and not model.startswith(f"{root / place}/") and not Path(model).is_dir():
            logger.info("%s is in %s, but its model lies at %s, which is not here", place, self.url, model)
            return None
        sizes, aside = manifest["files"], (root / place).with_name(f".{place.rpartition('/')[2]}.arriving")
        for stray in files.list_files(aside).keys() - sizes.keys():  # of one that was made anew there since
            (aside / stray).unlink()
        brought = sum((aside / name).stat().st_blocks * 512 for name in files.list_files(aside))  # s3fs leaves holes
        files.require_disk(root, sum(sizes.values()) - brought, f"bringing {place} from {self.url}")
        logger.info("bringing %s (%.2f GB) from %s", place, sum(sizes.values()) / 1e9, self.url)
        for name, size in sizes.items():
            self._fetch_file(f"{place}/{manifest['aside']}/{name}", aside / name, manifest["digests"][name], size)
        self.note(aside, manifest)
        files.write_json(aside / MANIFEST, {**without_ours(manifest), "artifact": artifact})
        return aside

    def note(self, folder: Path, manifest: Json) -> None:
        """Write into an artifact's folder that this remote has it, and which files."""
        files.write_json(folder / NOTE, {"url": self.url, "aside": manifest["aside"]})

    def _is_noted(self, folder: Path, manifest: Json) -> bool:
        try:
            return files.read_json(folder / NOTE) == {"url": self.url, "aside": manifest["aside"]}
        except (OSError, CorruptError):
            return False

    def fields(self, manifest: Json, root: Path) -> Json:
        """Return the artifact's fields of a manifest of the remote, with its paths told below our `root`."""
        return relocate(manifest["artifact"], manifest["root"], str(root))

    def _parse(self, place: str, data: bytes) -> Json:
        try:
            return parse_manifest(place, data)
        except (ValueError, RecursionError) as error:
            raise CorruptError(
                f"{self.url}/{place}/{MANIFEST} is not a manifest of ours ({error}): {self.way_out(place)}"
            ) from error

    def way_out(self, place: str) -> str:
        """Say what to do about an artifact that can't be used: its files go too, or they are taken for sent already."""
        return f"remove {self.url}/{place}/ whole, then who has it sends it again, or its step makes it"

    def _read_many(self, places: list[str]) -> list[bytes | Exception]:
        """Return the manifest at each place, or what reading it raised; at once where the file system can."""
        paths = [f"{self._root}/{place}/{MANIFEST}" for place in places]
        read = self._fs.cat(paths, recursive=False, on_error="return") if len(paths) > 1 else None
        if read is not None:
            return [read[path] for path in paths]
        try:
            return [self._fs.cat_file(path) for path in paths]
        except FileNotFoundError as error:
            return [error]

    def _make_parent(self, path: str) -> None:
        if self.protocol not in _WITHOUT_FOLDERS:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _send_file(self, source: Path, path: str, size: int) -> None:
        try:
            if self._fs.size(path) == size:
                return  # by a run that was killed; its name is of these very bytes
        except FileNotFoundError:
            pass
        self._make_parent(path)
        self._fs.put_file(str(source), path)

    def _announce(self, place: str, data: bytes) -> None:
        """Write the manifest, whole, and never over another machine's where the store can tell.

        Where it can't, two that write in the same moment both win here; `send` compares digests each time that it is
        asked, so they agree from their next step on, and no file of one is ever taken for the other's.
        """
        path = f"{self._root}/{place}/{MANIFEST}"
        if self.protocol not in _WITHOUT_FOLDERS:
            aside = f"{path}.{uuid.uuid4().hex}.tmp"
            self._make_parent(aside)
            self._fs.pipe_file(aside, data)
            if not self._fs.exists(path):
                self._fs.mv(aside, path)
            else:
                self._fs.rm_file(aside)
            return
        try:
            self._fs.pipe_file(path, data, mode="create")
            return
        except TypeError as error:  # s3fs, gcsfs and adlfs have this mode, ossfs hands it on to a call that has not
            why = str(error)
        except OSError as error:
            self._fs.invalidate_cache()
            if self._fs.exists(path):
                return  # another machine's came first, or this very one before its answer was lost
            if error.errno not in files.UNSUPPORTED:
                raise  # away or busy: written now, it could be over one that another machine counts on
            why = str(error)
        logger.info("%s knows no write that must be the first (%s)", self.url, why)
        if self.read(place) is None:
            self._fs.pipe_file(path, data)

    def _fetch_file(self, path: str, target: Path, digest: str, size: int) -> None:
        """Bring `<kind>/<key[:16]>/<aside>/<name>`."""
        if target.is_file() and files.digest(target) == digest and target.stat().st_size == size:
            return  # by a run that was killed
        target.parent.mkdir(parents=True, exist_ok=True)
        way_out = self.way_out("/".join(path.split("/")[:2]))
        with self._errors("reading"):
            try:
                self._fs.get_file(f"{self._root}/{path}", str(target))
            except FileNotFoundError as error:
                raise CorruptError(f"{self.url}/{path} is gone, though a manifest lists it: {way_out}") from error
        found, found_size = files.digest(target), target.stat().st_size
        if (found, found_size) != (digest, size):
            target.unlink()
            raise CorruptError(
                f"{self.url}/{path} has sha256 {found[:16]}... ({found_size} bytes), its manifest says "
                f"{digest[:16]}... ({size} bytes): {way_out}"
            )
        files.fsync_file(target)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn what a file system raises into ours; what has no other name may pass by itself."""
        try:
            yield
        except TataraError:
            raise
        except Exception as error:
            raise translate_error(error, doing, self.url) from error
