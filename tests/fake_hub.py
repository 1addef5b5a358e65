"""A hub on this machine, for huggingface_hub: repositories are directories, each at one commit at a time."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """`commits` by repository: the commit that its main branch is at, and every commit's directory. `asked`: the files
    whose content was sent.
    """

    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    main: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def push(self, repository: str, directory: Path) -> str:
        """A new commit of `repository` with the files of `directory`, on its main branch."""
        commit = hashlib.sha1(f"{repository}{len(self.commits.get(repository, ()))}".encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = directory
        self.main[repository] = commit
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, Path] | None:
        commit = self.main.get(repository) if revision == "main" else revision
        directory = self.commits.get(repository, {}).get(commit or "")
        return None if directory is None or commit is None else (commit, directory)


@contextmanager
def hub() -> Iterator[Hub]:
    """Serves until the block ends."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
                self._tree("/".join(parts[2:4]), parts[5])
            elif parts[:2] == ["api", "models"]:
                self._model("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif "resolve" in parts:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
            else:
                self._send(404, b"{}", {})

        def _model(self, repository: str, revision: str) -> None:
            found = served.find(repository, revision)
            if found is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file.name} for file in sorted(found[1].iterdir())]
            about = {"id": repository, "sha": found[0], "siblings": siblings, "private": False, "tags": []}
            return self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

        def _tree(self, repository: str, revision: str) -> None:
            found = served.find(repository, revision)
            files = sorted(found[1].iterdir()) if found else []
            listed = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
                for file in files
            ]
            self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

        def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
            found = served.find(repository, revision)
            if found is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            file = found[1] / name
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
            content = file.read_bytes()
            if body:
                served.asked.append(f"{repository}/{name}")
            return self._send(200, content, {"X-Repo-Commit": found[0], "ETag": f'"{_oid(file)}"'}, body)

        def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
