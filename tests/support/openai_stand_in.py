"""A stand-in for OpenAI-compatible servers: says what a test wants it to, fails when it is told to, remembers all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """A server on a free port.

    Attributes:
        reply: what it answers to messages: a text, a whole reply as an object, bytes to send as they are, or
            (status, error object) to fail.
        requests: bodies of the questions it was asked.
        keys: what it was sent as Authorization.
    """

    def __init__(self, reply, models=("stand-in",)):
        self.reply, self.models, self.requests, self.keys = reply, models, [], []
        self._mutex = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                owner.keys.append(self.headers["Authorization"])
                if owner.models is None:
                    return self.send(404, {"error": {"message": "no list here"}})
                return self.send(200, {"object": "list", "data": [{"id": name} for name in owner.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._mutex:
                    owner.keys.append(self.headers["Authorization"])
                    owner.requests.append(body)
                    said = owner.reply(body)
                if isinstance(said, tuple):
                    return self.send(said[0], {"error": said[1]})
                if isinstance(said, (dict, bytes)):
                    return self.send(200, said)
                return self.stream(said) if body.get("stream") else self.send(200, answer(said))

            def send(self, status, value):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")  # for clients that try again
                self.end_headers()
                self.wfile.write(data)

            def stream(self, text):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for piece in [text[start : start + 3] for start in range(0, len(text), 3)]:
                    self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
                    if piece == "!!!":
                        return  # the connection breaks
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                self.wfile.write(b"data: [DONE]\n\n")

            def event(self, value):
                chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", **value}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def prompts(self):
        """The last message of each question."""
        return [body["messages"][-1]["content"] for body in self.requests]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def answer(text):
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "text": text, "finish_reason": "stop"}]  # of a chat, of a completion
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
