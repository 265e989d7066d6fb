"""A Hugging Face Hub in this process: folders, served as the real one serves datasets."""

import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse

_SHA = "5" * 40


class FakeHub:
    """Serves until ``close``.

    Attributes:
      endpoint: its address.
      repos: (id, revision) → folder, or the code of the error that the Hub gives instead.
      requests: (method, path) of each request.
      sent_bytes: of files, in answers.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], pathlib.Path | str] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent_bytes = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        serve = lambda: self._server.serve_forever(poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked_for(self, part: str) -> int:
        return sum(part in path for _, path in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        size = int(self.headers.get("Content-Length", 0))
        self.requested = self.rfile.read(size).decode()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        match path.strip("/").split("/"):
            case ["api", "datasets", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "datasets", owner, name, "revision", *revision]:
                self._info(f"{owner}/{name}", "/".join(revision))
            case ["api", "datasets", owner, name, ("tree" | "paths-info") as what, *rest]:
                revision = 3 if rest[0] == "refs" else 1
                place = f"{owner}/{name}", "/".join(rest[:revision])
                self._list(place, what, "/".join(rest[revision:]))
            case ["datasets", owner, name, "resolve", *rest]:
                revision = 3 if rest[0] == "refs" else 1
                self._file(
                    (f"{owner}/{name}", "/".join(rest[:revision])), "/".join(rest[revision:])
                )
            case _:
                self._reply(404)

    do_GET = do_POST = do_HEAD

    def _folder(self, repo: str, revision: str) -> pathlib.Path | None:
        revisions = {rev: folder for (id_, rev), folder in self.hub.repos.items() if id_ == repo}
        if not revisions:
            self._reply(401, {"X-Error-Code": "RepoNotFound"})
            return None
        commits = {_commit(rev): folder for rev, folder in revisions.items()}
        folder = revisions.get(revision) or commits.get(revision)
        if isinstance(folder, pathlib.Path):
            return folder
        status = 403 if folder else 404
        self._reply(status, {"X-Error-Code": folder or "RevisionNotFound"})
        return None

    def _info(self, repo: str, revision: str) -> None:
        if folder := self._folder(repo, revision):
            siblings = [{"rfilename": path} for path in _files(folder)]
            self._json({"id": repo, "sha": _commit(revision), "siblings": siblings, "tags": []})

    def _list(self, place: tuple[str, str], what: str, below: str) -> None:
        if not (folder := self._folder(*place)):
            return
        wanted = None
        if what == "paths-info":
            wanted = urllib.parse.parse_qs(self.requested).get("paths") or (
                json.loads(self.requested)["paths"] if self.requested.startswith("{") else []
            )
        entries = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name in wanted if wanted is not None else name.startswith(below):
                kind = "directory" if path.is_dir() else "file"
                size = 0 if path.is_dir() else path.stat().st_size
                entries.append({"type": kind, "path": name, "size": size, "oid": _etag(name)})
        self._json(entries)

    def _file(self, place: tuple[str, str], name: str) -> None:
        if not (folder := self._folder(*place)):
            return
        if not (folder / name).is_file():
            self._reply(404, {"X-Error-Code": "EntryNotFound"})
            return
        data = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": _commit(place[1]), "ETag": f'"{_etag(name)}"'}
        status, given = 200, self.headers.get("Range")
        if given:
            first, last = given.removeprefix("bytes=").split("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            status, data = 206, data[int(first) : stop]
        self._reply(status, headers, data)
        if self.command == "GET":
            self.hub.sent_bytes += len(data)

    def _json(self, value) -> None:
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest() if len(revision) != 40 else revision


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def _files(folder: pathlib.Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
