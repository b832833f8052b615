"""The index as pages for people and JSON for programs: written as files that any web server can host, or served.

    index.html, index.json          every name of the owner, its newest version
    NAME.html, NAME.svg             its versions, metrics, tags, moves of aliases; its lineage
    catalog/NAME/3.json, blobs/…    what `weft store pull http://…` fetches

Read only. The server answers GET and HEAD, on this machine unless it is told otherwise, and shows one owner's adapters.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.drawing import html_page
from weft.errors import DamagedError, FormatError, NotInStoreError, StoreError, WeftError
from weft.formats.checks import parse_object
from weft.store.blobs import checked_address, checked_name
from weft.store.lineage import lineage
from weft.store.names import check_name
from weft.store.records import Version, moment
from weft.store.remote import open_blobs
from weft.store.shelves import MAX_RECORD, Catalog, Record, record_of

if TYPE_CHECKING:
    from weft.store.store import Store

__all__ = ["Pages", "Served", "make_server", "write_pages"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --faint: #5b6675; --line: #d9dfe8; --paper: #fff; --mark: #2f6fd6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf1; --faint: #9aa5b5; --line: #333c4a; --paper: #14181f; --mark: #7fb0ff; } }
body { font: 15px/1.5 ui-sans-serif, system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; } p.faint, .faint { color: var(--faint); }
a { color: var(--mark); text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: .85rem; } th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; } td:last-child { white-space: nowrap; }
td.right, th.right { text-align: right; padding-right: 1.8rem; } code { font: 13px ui-monospace, monospace; } .alias { border: 1px solid var(--mark); color: var(--mark); border-radius: 9px; padding: 0 .5em; font-size: .8rem; margin-left: .3em; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
"""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MOST = 10_000
"""Names on the first page."""


class Pages:
    """What there is to see of a store; each is rendered when it is asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def newest(self) -> list[Version]:
        """The newest version of each name, by name."""
        return sorted(self.store.find(limit=_MOST), key=lambda version: version.name.lower())

    def index_json(self) -> bytes:
        """Every name, its newest version, and the numbers of all."""
        numbers: dict[str, list[int]] = {}
        for version in self.store.find(all_versions=True, limit=1 << 30):
            numbers.setdefault(version.name, []).append(version.number)
        said = {
            "format": 1,
            "catalog": {name: sorted(found) for name, found in sorted(numbers.items())},
            "adapters": [version.to_dict() for version in self.newest()],
        }
        return json.dumps(said, indent=1, ensure_ascii=False, default=str).encode("utf-8", "replace")

    def index_html(self) -> bytes:
        """The first page."""
        versions = self.newest()
        rows = [
            (f'<a href="{_link(version.name)}.html">{_text(version.name)}</a>{_aliases(version)}', str(version.number), _text(version.base_name or version.base[:12]),
             str(version.rank), _metrics(version), _tags(version), f'<code>{version.digest[:12]}</code>', moment(version.created)[:10])
            for version in versions
        ]  # fmt: skip
        heads = ("name", ">version", "base", ">rank", "metrics", "tags", "digest", "newest")
        body = f'<h1>Adapters</h1><p class=faint>{len(versions):,} {"name" if len(versions) == 1 else "names"} of {_text(self.store.owner)}. <a href="index.json">index.json</a> has the same for programs.</p>'
        return _page("Adapters", body + (_table(heads, rows) if rows else "<p>Nothing yet.</p>"))

    def name_html(self, name: str) -> bytes:
        """The page of a name."""
        versions = self.store.versions(name)
        rows = [
            (f"{version.number}{_aliases(version)}", str(version.rank), f"{version.parameters:,}", _metrics(version), _tags(version),
             _text(version.note), f"<code>{version.digest[:12]}</code>", moment(version.created)[:16].replace("T", " "))
            for version in versions
        ]  # fmt: skip
        newest = versions[0]
        body = f'<p><a href="index.html">Adapters</a></p><h1>{_text(name)}</h1><p class=faint>base {_text(newest.base_name or "not known")} <code>{newest.base[:12]}</code></p>'
        body += _table(("version", ">rank", ">numbers", "metrics", "tags", "note", "digest", "put (UTC)"), rows)
        moves = [(_text(move.alias), move.kind + (", taken back" if move.undone else ""), str(move.before or ""), str(move.after or ""), _text(move.required), _text(move.by), moment(move.at)[:16].replace("T", " "))
                 for move in self.store.moves(name)]  # fmt: skip
        if moves:
            body += "<h2>Moves of aliases</h2>" + _table(
                ("alias", "", ">from", ">to", "required", "by", "when (UTC)"), moves
            )
        if newest.parents:
            body += f'<h2>Lineage</h2><img src="{_link(name)}.svg" alt="What {_text(name)} was made of">'
        data = [
            (_text(item["role"]), _text(item["source"]), f"<code>{_text(item['digest'][:12])}</code>")
            for item in newest.data
        ]
        if data:
            body += "<h2>Data</h2>" + _table(("", "source", "digest"), data)
        return _page(name, body)

    def svg(self, name: str) -> bytes:
        """The lineage of a name's newest version."""
        return lineage(self.store, name).svg().encode("utf-8", "replace")

    def record(self, name: str, number: int) -> bytes:
        """What a catalog says of a version."""
        version = self.store.version(f"{check_name(name)}@{number}")
        return record_of(
            version, self.store.index.files(version.address), self.store.provenance(version).to_dict()
        ).to_json()

    def aliases(self, name: str) -> bytes:
        """Aliases of a name."""
        return json.dumps(
            {alias: version.number for version in self.store.versions(name) for alias in version.aliases}
        ).encode()


def write_pages(store: Store, out: Path, *, with_blobs: bool = False) -> int:
    """Write all pages into a directory, new or empty; gives how many adapters it shows.

    Args:
        with_blobs: copy the adapters too, so that ``weft store pull`` works from where it is hosted.

    Raises:
        StoreError: the directory holds something, or can't be written.
    """
    pages = Pages(store)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StoreError(f"{out}: something is there already; give a new directory")
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_bytes(pages.index_html())
        (out / "index.json").write_bytes(pages.index_json())
        found = pages.newest()
        for newest in found:
            name = newest.name
            (out / f"{name}.html").write_bytes(pages.name_html(name))
            if newest.parents:
                (out / f"{name}.svg").write_bytes(pages.svg(name))
            if with_blobs:
                _write_catalog(pages, name, out)
    except OSError as problem:
        raise StoreError(f"{problem.filename or out}: can't be written: {problem.strerror or problem}") from problem
    return len(found)


def _write_catalog(pages: Pages, name: str, out: Path) -> None:
    store = pages.store
    (out / "catalog" / name).mkdir(parents=True)
    for version in store.versions(name):
        (out / "catalog" / name / f"{version.number}.json").write_bytes(pages.record(name, version.number))
        files = store.index.files(version.address)
        place = out / "blobs" / version.address[:2] / version.address
        if not place.exists():
            with store.blobs.fetch(version.address, files) as folder:
                store.blobs.check(version.address, files, folder)
                place.mkdir(parents=True)
                for file in files:
                    shutil.copyfile(folder / file, place / file)
    (out / "catalog" / name / "aliases.json").write_bytes(pages.aliases(name))


def _page(title: str, body: str) -> bytes:
    return html_page(title, _STYLE, body).encode("utf-8", "replace")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of cells that are HTML, without empty columns; a heading that starts with ``>`` is a column of numbers."""
    kept = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    heads, rows = tuple(heads[column] for column in kept), [tuple(row[column] for column in kept) for row in rows]
    sides = [' class="right"' if head.startswith(">") else "" for head in heads]
    top = "".join(f"<th{side}>{head.removeprefix('>')}</th>" for head, side in zip(heads, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _link(name: str) -> str:
    return urllib.parse.quote(name)


def _aliases(version: Version) -> str:
    return "".join(f'<span class="alias">{_text(alias)}</span>' for alias in version.aliases)


def _metrics(version: Version) -> str:
    return "<br>".join(f"{_text(name)} {value:.4g}" for name, value in version.metrics.items())


def _tags(version: Version) -> str:
    return "<br>".join(f"{_text(key)}={_text(value)}" for key, value in version.tags.items())


# served


def make_server(store: Store, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server of a store's pages; ``serve_forever`` starts it, ``server_address`` says where it is.

    Raises:
        StoreError: the port is taken, or the host isn't this machine.
    """
    handler = type("Handler", (_Handler,), {"pages": Pages(store), "local": host in ("127.0.0.1", "localhost", "::1")})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as problem:
        raise StoreError(f"{host}:{port} can't be listened on: {problem}; give another --port") from problem


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD; everything else is refused. What can be asked for is listed in `_route`."""

    pages: Pages
    local: bool
    server_version = "weft-store"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, format: str, *args: Any) -> None:
        """No log on stderr."""

    def _answer(self, with_body: bool) -> None:
        path = urllib.parse.urlsplit(self.path).path
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.local and host not in (
            "127.0.0.1",
            "localhost",
            "[::1]",
        ):  # a page elsewhere that calls this machine by a name of its own
            return self._say(403, "text/plain", b"this server is for this machine\n", with_body)
        try:
            blob = re.fullmatch(r"/blobs/[0-9a-f]{2}/([0-9a-f-]{64,96})/([\w.-]+)", path)
            if blob is not None:
                return self._blob(blob[1], blob[2], with_body)
            kind, data = self._route(path)
        except NotInStoreError:
            kind, data = "", b""
        except WeftError as problem:
            return self._say(500, "text/plain; charset=utf-8", f"{problem}\n".encode("utf-8", "replace"), with_body)
        if not kind:
            return self._say(404, "text/plain", b"there is no such page\n", with_body)
        return self._say(200, kind, data, with_body)

    def _route(self, path: str) -> tuple[str, bytes]:
        if path in ("/", "/index.html"):
            return "text/html; charset=utf-8", self.pages.index_html()
        if path == "/index.json":
            return "application/json", self.pages.index_json()
        record = re.fullmatch(r"/catalog/([\w.-]{1,128})/(?:([1-9]\d{0,8})|aliases)\.json", path, re.ASCII)
        if record is not None:
            return "application/json", self.pages.record(record[1], int(record[2])) if record[
                2
            ] else self.pages.aliases(record[1])
        name = re.fullmatch(r"/([\w.-]{1,128})\.(html|svg)", path, re.ASCII)
        if name is not None:
            with contextlib.suppress(NotInStoreError):
                if name[2] == "svg":
                    return "image/svg+xml", self.pages.svg(name[1])
                return "text/html; charset=utf-8", self.pages.name_html(name[1])
        return "", b""

    def _blob(self, address: str, name: str, with_body: bool) -> None:
        store = self.pages.store
        files = store.index.files(checked_address(address))
        mine = any(version.address == address for version in store.index.holding([address[:64]]).get(address[:64], ()))
        if not mine or checked_name(name) not in files:
            return self._say(404, "text/plain", b"there is no such file\n", with_body)
        with store.blobs.fetch(address, {name: files[name]}) as folder, (folder / name).open("rb") as file:
            self._head(200, "application/octet-stream", files[name].size)
            if with_body:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _say(self, status: int, kind: str, data: bytes, with_body: bool) -> None:
        self._head(status, kind, len(data))
        if with_body:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

    def _head(self, status: int, kind: str, size: int) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(size),
            "Cache-Control": "no-cache",
            **_HEADERS,
        }.items():
            self.send_header(name, value)
        self.end_headers()


class Served(Catalog):
    """A catalog behind a web server, to pull from."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(open_blobs(tempfile.gettempdir()))
        self.shown = url

    def numbers(self) -> dict[str, list[int]]:
        """See `Shelf.numbers`: from index.json."""
        data = self._read("index.json")
        if data is None:
            raise StoreError(f"{self.url}: there is no index.json; expected the address of weft store serve-index")
        said = parse_object(
            data, lambda message, key: FormatError(message, path=f"{self.url}/index.json", key=key)
        ).get("catalog")
        if not isinstance(said, Mapping):
            raise FormatError("no catalog in it", path=f"{self.url}/index.json")
        found = {check_name(name): list(numbers) if isinstance(numbers, list) else [] for name, numbers in said.items()}
        if any(type(number) is not int or not 0 < number < 10**9 for numbers in found.values() for number in numbers):
            raise FormatError("numbers of versions are counted from 1", path=f"{self.url}/index.json", key="catalog")
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    @contextlib.contextmanager
    def fetch(self, record: Record) -> Iterator[Path]:
        """See `Shelf.fetch`; no more is read than the record says."""
        with tempfile.TemporaryDirectory(prefix="weft-store-") as folder:
            for name, facts in record.files.items():
                path = f"blobs/{record.address[:2]}/{record.address}/{name}"
                with self._open(path) as answer, (Path(folder) / name).open("wb") as file:
                    left = facts.size
                    while left and (chunk := answer.read(min(left, 1 << 20))):
                        file.write(chunk)
                        left -= len(chunk)
                    if left or answer.read(1):
                        raise DamagedError(
                            f"{self.url}/{path}: it has not the {facts.size:,} bytes that its record says"
                        )
            self.blobs.check(record.address, record.files, Path(folder))
            yield Path(folder)

    def send(self, record: Record, folder: Path) -> None:
        """See `Shelf.send`.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"{self.url}: a web server can be pulled from, not pushed to")

    def point(self, name: str, aliases: Mapping[str, int]) -> None:
        """See `Shelf.point`."""

    def _read(self, path: str) -> bytes | None:
        try:
            with self._open(path) as answer:
                data: bytes = answer.read(MAX_RECORD + 1)
        except FileNotFoundError:
            return None
        if len(data) > MAX_RECORD:
            raise FormatError(f"more than {MAX_RECORD:,} bytes are no record", path=f"{self.url}/{path}")
        return data

    def _open(self, path: str) -> Any:
        try:
            return urllib.request.urlopen(f"{self.url}/{urllib.parse.quote(path)}", timeout=60)
        except urllib.error.HTTPError as problem:
            if problem.code == 404:
                raise FileNotFoundError(path) from None
            raise StoreError(f"{self.url}/{path}: {problem.code} {problem.reason}") from problem
        except (OSError, ValueError) as problem:
            raise StoreError(f"{self.url}: can't be reached: {getattr(problem, 'reason', problem)}") from problem
