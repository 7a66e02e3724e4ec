"""A stand-in of the Hugging Face Hub on this machine: the part of its HTTP interface by which repositories are made, written
in commits and read. It checks what it is sent, and keeps all in memory.

The interface as huggingface_hub speaks it: repos/create, preupload, commit, repo info, tree, paths-info, resolve. All files
come in the commit itself, as small ones do; the protocol for large ones is not played. Data sets are read only: their names
in ``repositories`` start with "datasets/".
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standin"


class Repository:
    """Branches of commits, each a dictionary path -> bytes."""

    def __init__(self, private):
        self.private, self.commits, self.branches = private, {}, {}
        self.commit("main", {})

    def commit(self, branch, files):
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision):
        """Commit and files of a branch or commit; None where there is none."""
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


def _entries(files, folder, is_deep):
    """What the Hub lists of a folder: files and folders, of the folders in it too where ``is_deep``."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: data for path, data in files.items() if path.startswith(prefix)}
    folders = {str(parent) for path in inside for parent in PurePosixPath(path).parents if str(parent) not in (".", folder)}
    listed = [dict(type="directory", path=path, size=0, oid="0") for path in sorted(folders) if path.startswith(prefix)]
    listed += [dict(type="file", path=path, size=len(data), oid=hashlib.sha1(data).hexdigest())
               for path, data in inside.items()]  # fmt: skip
    return [entry for entry in listed if is_deep or "/" not in entry["path"].removeprefix(prefix)]


class StandIn(ThreadingHTTPServer):
    """The server; ``endpoint`` is its address, ``repositories`` what it holds, ``asked`` every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked = {}, []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.command == "POST" and not self._is_known():
            return self._send(401, {"error": "Invalid credentials"})
        parts = path.split("/")
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path == "api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._of_repository("/".join(parts[2:4]), parts[4:], body)
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            return self._of_repository("/".join(parts[1:4]), parts[4:], body)
        if len(parts) >= 6 and parts[0] == "datasets" and parts[3] == "resolve":
            return self._resolve("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self._send(404, {"error": "no such page"})

    def _is_known(self):
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if name in self.server.repositories:
            return self._send(409, {"error": "exists", "url": f"{self.server.endpoint}/{name}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private)
        self._send(200, {"url": f"{self.server.endpoint}/{name}", "id": name})

    def _repository(self, name):
        repository = self.server.repositories.get(name)
        if repository is None or repository.private and not self._is_known():
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _of_repository(self, name, rest, body):
        repository = self._repository(name)
        if repository is None:
            return
        action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if action == "preupload":
            given = json.loads(body)["files"]
            files = [dict(path=file["path"], shouldIgnore=False, oid=None, uploadMode="regular") for file in given]
            return self._send(200, {"files": files})
        if action == "commit":
            return self._commit(name, repository, revision, body)
        found = repository.files(revision)
        if found is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        if action == "tree":
            is_deep = "recursive=true" in urlsplit(self.path).query.lower()
            return self._send(200, _entries(files, "/".join(rest[2:]), is_deep))
        if action == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return self._send(200, [entry for entry in _entries(files, "", True) if entry["path"] in asked])
        info = dict(_id="1", id=name.removeprefix("datasets/"), modelId=name, sha=sha, private=repository.private,
                    tags=[], downloads=0, likes=0, siblings=[{"rfilename": path} for path in files])  # fmt: skip
        self._send(200, info)

    def _commit(self, name, repository, branch, body):
        base = repository.files(branch)
        if base is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = dict(base[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
        sha = repository.commit(branch, files)
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        self._send(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def _resolve(self, name, revision, path):
        repository = self._repository(name)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        if path not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[path]
        self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def _send(self, status, content, headers=None):
        is_file = isinstance(content, bytes)
        data = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if is_file else "application/json"
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def standing_in():
    """The server, running."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
