"""An HTTP server on loopback that answers as a test tells it to."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from reward_server.client.failover import FINGERPRINT_HEADER
from reward_server.components import NAMES


def scored(body: dict) -> dict:
    """What a good server answers: the text back, one number."""
    results = []
    for item in body["items"]:
        score = dict.fromkeys(NAMES) | {"ocr_text": item["text"], "ocr_accuracy": 0.5}
        errors = {field: "not here" for field in NAMES if score[field] is None}
        results.append(
            {"score": {**score, "errors": errors, "reward_model_disabled": False}, "error": None}
        )
    return {"results": results}


def hash_scored(number, body):
    """Rewards that the pictures' bytes decide, whoever asks."""
    results = []
    for item in body["items"]:
        digest = hashlib.sha256(base64.b64decode(item["image"])).digest()
        score = dict.fromkeys(NAMES) | {"ocr_text": item["text"], "ocr_accuracy": digest[0] / 256}
        errors = {name: "not here" for name in NAMES if score[name] is None}
        answer = {**score, "errors": errors, "reward_model_disabled": False}
        results.append({"score": answer, "error": None})
    return 200, {}, {"results": results}


class Script:
    """Replies what `answer(number, body)` gives: (status, headers, content), or None to hang up.

    A GET is answered with `info_status` and `info`, that of `/alphabet` with `characters`; every
    answer names the setup `fingerprint`.
    """

    def __init__(self, answer=lambda number, body: (200, {}, scored(body)), fingerprint="one"):
        self.fingerprint, self.info = fingerprint, {"scorers": {"ocr": {"engine": "scripted"}}}
        self.info_status, self.paths = 200, []
        self.characters = None  # of `/alphabet`, which an older server has not
        self.answer, self.bodies, self.connections, self.headers = answer, [], 0, []
        script, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                with lock:
                    script.connections += 1
                super().setup()

            def do_GET(self):
                if self.path != "/alphabet":
                    self.reply(script.info_status, {}, script.info)
                elif script.characters is None:
                    self.reply(404, {}, {"detail": "Not Found"})
                else:
                    self.reply(200, {}, {"characters": script.characters})

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["content-length"]))
                script.paths.append(self.path)
                if self.path == "/score_files":  # an older server
                    self.reply(404, {}, {"detail": "Not Found"})
                    return
                body = json.loads(raw)
                with lock:
                    script.bodies.append(body)
                    script.headers.append(dict(self.headers))
                    number = len(script.bodies)
                reply = script.answer(number, body)
                if reply is None:  # hang up
                    self.close_connection = True
                    return
                self.reply(*reply)

            def reply(self, status, headers, content):
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                named = (
                    {} if script.fingerprint is None else {FINGERPRINT_HEADER: script.fingerprint}
                )
                for name, value in {"content-length": str(len(raw)), **named, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
                if "content-length" in headers:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
