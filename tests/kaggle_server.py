"""A small Kaggle on loopback, for the real kaggle client: the API, its storage, and faults.

To run a script against it, with the archive that it serves:

    python tests/kaggle_server.py ARCHIVE.zip SCRIPT [ARGUMENT ...]
"""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

# Kaggle's client knows localhost only on port 80, and waits for a minute between its tries. Python
# runs this file when it starts, so the client's own process has the other port, and waits less.
SITE_CUSTOMIZE = """
import os, time
import kagglesdk.kaggle_env as env
env._env_to_endpoint[env.KaggleEnv.LOCAL] = os.environ["TEST_SERVER_ADDRESS"]
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)
"""


@functools.cache
def archive_of(faces):
    """Kaggle's archive as bytes: the faces, and a table of their attributes.

    An attribute is a bit of the face's number. The table is large: the client writes whole MiB.
    """
    table = "image_id,Eyeglasses,Smiling,Male\n"
    for number in range(1, 180_000):
        values = ",".join(f"{number % 8:03b}").replace("0", "-1")
        table += f"{number:06d}.jpg,{values}\n"
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for number, path in enumerate(sorted(faces.glob("*.jpg")), 1):
            archive.write(path, f"img_align_celeba/img_align_celeba/{number:06d}.jpg")
        archive.writestr("list_attr_celeba.csv", table)
    return memory.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def note(self, body=""):
        self.account, self.part = map(self.headers.get, ("Authorization", "Range"))
        self.server.requests.append((self.command, self.account, self.part, body))

    def answer(self, status, body=b"{}", size=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": size or len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server = self.server
        self.note(self.rfile.read(int(self.headers["Content-Length"])).decode())
        good = self.account == "Bearer good-token"
        if server.mute:
            server.left.wait(1)
        if self.path.endswith("/IntrospectToken"):
            self.answer(200, json.dumps({"active": good, "username": "x" if good else ""}).encode())
        elif server.refusal or (self.account or server.needs_token) and not good:
            self.answer(server.refusal or 401, b'{"message": "refused"}')
        elif self.path.endswith("/GetDatasetMetadata"):
            self.answer(200, b'{"info": {"licenses": [{"name": "other"}]}}')
        else:
            self.answer(302, Location="/storage/archive.zip")

    def do_GET(self):
        server = self.server
        self.note()
        if self.part and server.expired:
            return self.answer(403, b"<html>expired</html>")
        etag = hashlib.sha256(server.archive).hexdigest()
        again = self.part and self.headers["If-Range"] == etag
        rest = server.archive[int(self.part[6:-1]) if again else 0 :]  # of bytes=1048576-
        end = server.cut or server.stall or len(rest)
        stall, server.cut, server.stall = server.stall, None, None
        about = {"ETag": etag, "Last_Modified": "Mon, 03 Jun 2019 08:00:00 GMT"}
        about |= {"Accept_Ranges": "bytes", "Content_Type": "application/zip"}
        self.answer(206 if again else 200, rest[:end], len(rest), **about)
        if stall:
            with contextlib.suppress(ConnectionError):
                self.connection.recv(1)
            server.left.set()
        self.close_connection = end < len(rest)


class KaggleServer(http.server.ThreadingHTTPServer):
    """Serves `archive` (bytes); other tokens than "good-token" are refused.

    The faults: `refusal`, the status with which the API answers; `mute`, it waits for a second;
    `expired`, storage refuses to send the rest of an archive; `cut`, the number of bytes after
    which the next connection to storage is cut, or `stall`, after which it falls silent until the
    client has gone, and then sets `left`.
    """

    daemon_threads = True
    handle_error = Handler.log_message  # nothing on clients that are killed

    def __init__(self, archive):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive = archive
        self.needs_token = self.mute = self.expired = False
        self.refusal = self.cut = self.stall = None
        self.left = threading.Event()
        self.requests = []  # (method, Authorization, Range, body)

    def environment(self, home):
        """Variables for a process that shall speak to this server, and can reach no other."""
        modules = Path(home) / "modules"
        modules.mkdir(parents=True, exist_ok=True)
        (modules / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE")}
        return kept | {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "TEST_SERVER_ADDRESS": f"http://localhost:{self.server_port}",
            "PYTHONPATH": str(modules),
            "HOME": str(home),
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "localhost,127.0.0.1",
        }


@contextlib.contextmanager
def serving(archive):
    """A KaggleServer in a thread of its own."""
    with KaggleServer(archive) as server, contextlib.ExitStack() as end:
        end.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server


if __name__ == "__main__":
    with serving(Path(sys.argv[1]).read_bytes()) as kaggle:
        environment = kaggle.environment(Path("home").resolve())
        sys.exit(subprocess.run([sys.executable, *sys.argv[2:]], env=environment).returncode)
