"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP as its own client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "x" * 34
COMMIT = "c" * 40


class Hub:
    """repositories: name -> {"private", "files": {path: bytes}}
    refuse: (method, part of a path) -> status
    """

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}
        self.refuse: dict[tuple[str, str], int] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.commits = 0
        self.url = ""

    def info(self, repo: str) -> dict:
        entry = self.repositories[repo]
        siblings = [{"rfilename": name} for name in entry["files"]]
        return {"id": repo, "private": entry["private"], "sha": COMMIT, "siblings": siblings}

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        self.repositories[name] = {"private": private, "files": dict(files or {})}

    def commit(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repositories[repo]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo]["files"][value["path"]] = self.stored[value["oid"]]
        self.commits += 1


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=None, status=200, headers=None, data=None):
        body = data if data is not None else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub = self.hub
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        hub.bodies.append(body)
        for (method, part), status in hub.refuse.items():
            if method == self.command and part in path:
                return self.answer({"error": "no"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/upload/"):
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "someone", "type": "user"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'someone'}/{asked['name']}"
            if name in hub.repositories:
                return self.answer({"error": "You already created it", "url": f"{hub.url}/{name}"}, 409)
            hub.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self.answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            hub.stored[path.rpartition("/")[2]] = body
            return self.answer()
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if repo not in hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.of_repository(repo, path, body)

    def of_repository(self, repo, path, body):
        hub, files = self.hub, self.hub.repositories[repo]["files"]
        if "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one
                if one["oid"] in hub.stored
                else {**one, "actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name not in files:
                return self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            etag = hashlib.sha256(files[name]).hexdigest()
            return self.answer(data=files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if "/tree/" in path:
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.answer(found)
        return self.answer(hub.info(repo))

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def running_hub():
    """A hub that answers at `.url`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
