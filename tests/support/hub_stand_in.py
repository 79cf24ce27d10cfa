"""A stand-in for the hubs: the endpoints of Hugging Face and ModelScope that downloads use, and what may go wrong."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """A hub with one repository, and a second host that it redirects large files to.

    Attributes:
        files: content by path, of the repository owner/name.
        large: paths that are stored elsewhere, with a SHA-256; the others have a git hash.
        faults: by path, what happens to its next requests, one after another: "cut" (half of the bytes, then the
            ends), "busy" (503), "limited" (429, Retry-After 0), "no part" (416), "whole" (no ranges), "other" (other
            bytes).
        served: (path, Range, bytes sent) of each request for a file; keys: (host, header, value) of keys that came.
        page: most files of a page of ModelScope's data sets.
    """

    def __init__(self, files, large=()):
        self.files, self.large, self.faults, self.served, self.keys = dict(files), set(large), {}, [], []
        self.locked, self.page = False, 200
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                owner.answer(self)

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def answer(self, handler):
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        host = f"http://{handler.headers['Host']}"
        for name in ("Authorization", "Cookie"):
            if handler.headers[name]:
                self.keys.append((host, name, handler.headers[name]))
        if host == self.store:
            return self.send_file(handler, path.removeprefix("/store/"))
        if self.locked and "secret" not in handler.headers.get("Authorization", ""):
            return self.send_json(handler, {"error": "gated", "Message": "no"}, 401)
        for kind in ("models", "datasets"):
            root = f"/api/{kind}/owner/name"
            if path in (root, f"{root}/revision/main", f"{root}/revision/{COMMIT}"):
                return self.send_json(handler, {"id": "owner/name", "sha": COMMIT, "siblings": [], "tags": []})
            if path == f"{root}/tree/{COMMIT}":
                return self.send_json(handler, [self.hugging_face_entry(name) for name in self.files])
            root = f"/api/v1/{kind}/owner/name/repo"
            if path == f"{root}/files" and kind == "models":
                return self.send_json(handler, {"Code": 200, "Data": {"Files": self.modelscope_entries()}})
            if path == f"{root}/tree" and kind == "datasets":
                begin = (int(query["PageNumber"]) - 1) * self.page
                files = self.modelscope_entries()[begin : begin + self.page]
                return self.send_json(handler, {"Code": 200, "Data": {"Files": files}})
            if path == root and query.get("FilePath") in self.files:
                return self.redirect_or_send(handler, query["FilePath"])
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name in self.files:
            return self.redirect_or_send(handler, name)
        return self.send_json(handler, {"error": "Repository not found", "Code": 404}, 404)

    def hugging_face_entry(self, name):
        content = self.files[name]
        entry = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def modelscope_entries(self):
        folders = sorted({name.rpartition("/")[0] for name in self.files if "/" in name})
        return [{"Type": "tree", "Path": name, "Name": name, "Size": 0, "Sha256": ""} for name in folders] + [
            {
                **{"Type": "blob", "Path": name, "Name": name.rpartition("/")[2], "Size": len(content)},
                "Sha256": hashlib.sha256(content).hexdigest() if name in self.large else "",
            }
            for name, content in self.files.items()
        ]

    def redirect_or_send(self, handler, name):
        if name not in self.large:
            return self.send_file(handler, name)
        handler.send_response(302)
        handler.send_header("Location", f"{self.store}/store/{name}")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()

    def send_file(self, handler, name):
        content, asked = self.files[name], handler.headers["Range"]
        waiting = self.faults.get(name) or [None]
        fault = waiting.pop(0)
        statuses = {"busy": 503, "limited": 429, "no part": 416}
        if fault in statuses:
            self.served.append((name, asked, 0))
            return self.send_json(handler, {}, statuses[fault])
        if fault == "other":
            content = bytes(byte ^ 1 for byte in content)
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "whole" else 0
        body = content[begin:]
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        sent = body[: len(body) // 2] if fault == "cut" else body
        self.served.append((name, asked, len(sent)))
        handler.wfile.write(sent)
        if fault == "cut":
            handler.close_connection = True

    def send_json(self, handler, value, status=200):
        data = json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status == 429:
            handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()
