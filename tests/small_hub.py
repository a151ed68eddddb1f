"""A small server that speaks the needed part of the hub's language."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """Repositories as dictionaries of commits."""

    commits: dict[str, dict[str, bytes]]
    """By commit and by branch: the files."""
    asked: list[str]

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def home(self) -> str:
        return f"http://{self.headers['Host']}/me/model"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        if self.path.endswith("/validate-yaml"):
            return self.answer(b"{}")
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            return self.answer(json.dumps({"files": files}).encode())
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = hashlib.sha1(body).hexdigest()
            self.commits[commit] = self.commits[self.path.rpartition("/")[2]] = files
            found = {
                "commitUrl": f"http://{self.headers['Host']}/me/model/commit/{commit}",
                "commitOid": commit,
            }
            return self.answer(json.dumps(found).encode())
        return self.answer(json.dumps({"url": self.home}).encode())

    def do_GET(self):
        self.asked.append(self.path)
        _, owner, _, _, revision, name = (*self.path.split("/"), *6 * [""])[:6]
        files = self.commits.get(revision, {}) if owner == "me" else {}
        if name not in files:
            code = (
                "EntryNotFound"
                if files
                else "RevisionNotFound"
                if owner == "me"
                else "RepoNotFound"
            )
            return self.answer(b"", 404, X_Error_Code=code)
        commit = next(key for key, value in self.commits.items() if value is files)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    handler = type("OneHub", (Hub,), {"commits": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()
