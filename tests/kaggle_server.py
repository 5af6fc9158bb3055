"""A small Kaggle on loopback, for the real kaggle client: the API, its storage, and faults.

To run a script against it, with the archive that it serves:

    python tests/kaggle_server.py ARCHIVE.zip SCRIPT [ARGUMENT ...]
"""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import ssl
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

NAME = "img_align_celeba/img_align_celeba/{}"
TABLES = ("attr_celeba", "bbox_celeba", "eval_partition", "landmarks_align_celeba")
TABLE_BYTES = 3_200_000  # the client writes whole MiB only
# Kaggle's client knows localhost only on port 80. Python runs this file when it starts, so the
# client's own process has the other port.
SITE_CUSTOMIZE = """
import os
import kagglesdk.kaggle_env as env
env._env_to_endpoint[env.KaggleEnv.LOCAL] = os.environ["TEST_SERVER_ADDRESS"]
"""


def archive_of(faces, more=()):
    """Kaggle's archive as bytes: faces, four tables, and the (name or ZipInfo, data) of `more`."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for index, path in enumerate(sorted(faces.glob("*.jpg")), 1):
            archive.write(path, NAME.format(f"{index:06d}.jpg"))
        for table in TABLES:
            text = attribute_table() if table == TABLES[0] else random.Random(0).randbytes(100)
            archive.writestr(f"list_{table}.csv", text)
        for member, data in more:
            archive.writestr(member, data)
    return memory.getvalue()


def attribute_table():
    """A table like CelebA's, of TABLE_BYTES, with three attributes."""
    rows = ["image_id,Male,Smiling,Eyeglasses"]
    for index in range(1, TABLE_BYTES // 20):
        values = (1 if index >> bit & 1 else -1 for bit in range(3))
        rows.append(",".join([f"{index:06d}.jpg", *map(str, values)]))
    return "\n".join(rows)[:TABLE_BYTES].rpartition("\n")[0].ljust(TABLE_BYTES, "\n").encode()


class KaggleServer(http.server.ThreadingHTTPServer):
    """Serves `archive` (bytes), with `needs_token` to good credentials alone.

    Bad credentials are refused in any case.

    Faults, each a list of which every request uses up the first entry:

    api_answers     statuses instead of the redirect to storage
    storage_answers statuses, each with an HTML page, instead of the archive; 200: the archive
    cuts            numbers of bytes after which the connection to storage is cut
    stalls          numbers of bytes after which storage falls silent, and then cuts
    pages           bodies that storage sends instead of the archive, with status 200
    hang            seconds of silence before the next answer of the API

    `listing`: names of the files that the API lists; None: it refuses. `storage`: the address to
    which it sends for the archive. `secret`: a file with a key and a certificate, for TLS.
    """

    daemon_threads = True

    def __init__(
        self, archive, needs_token=False, token="good-token", key="someone:good-key", secret=None
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        if secret:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(secret)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.storage = None
        self.archive, self.needs_token = archive, needs_token
        self.good = (f"Bearer {token}", "Basic " + base64.b64encode(key.encode()).decode())
        self.etag = '"' + hashlib.sha256(archive).hexdigest()[:16] + '"'
        self.api_answers, self.storage_answers, self.hang = [], [], []
        self.cuts, self.stalls, self.pages = [], [], []
        self.listing = None
        self.closing = threading.Event()
        self.requests = []  # (method, path, Authorization, Range)
        self.address = f"http://localhost:{self.server_port}"

    def environment(self, home, **more):
        """Variables for a process that shall speak to this server, and can reach no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE")}
        modules = Path(home) / "modules"
        modules.mkdir(parents=True, exist_ok=True)
        (modules / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        variables = {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "TEST_SERVER_ADDRESS": self.address,
            "PYTHONPATH": str(modules),
            "HOME": str(home),
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "localhost,127.0.0.1",
        }
        return kept | variables | more

    def downloads(self):
        return [request for request in self.requests if request[0] == "GET"]

    def handle_error(self, request, client_address):
        pass  # clients that are killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def note(self):
        account, part = self.headers.get("Authorization"), self.headers.get("Range")
        self.server.requests.append((self.command, self.path, account, part))

    def answer(self, status, body, kind="application/json", **headers):
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.note()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        authorised = self.headers.get("Authorization") in server.good
        if server.hang:
            server.closing.wait(server.hang.pop(0))
        if self.path.endswith("/IntrospectToken"):
            about = {"active": authorised, "username": "someone" if authorised else ""}
            self.answer(200, json.dumps(about).encode())
        elif self.path.endswith("/ListDatasetFiles"):
            files = [{"name": name, "totalBytes": 9} for name in server.listing or ()]
            status = 404 if server.listing is None else 200
            self.answer(status, json.dumps({"datasetFiles": files}).encode())
        elif self.path.endswith("/GetDataset"):  # kagglehub asks
            self.answer(200, b'{"currentVersionNumber": 2}')
        elif self.path.endswith("/GetDatasetMetadata") and (authorised or not server.needs_token):
            self.answer(200, b'{"info": {"licenses": [{"name": "other"}]}}')
        elif server.api_answers:
            status = server.api_answers.pop(0)
            self.answer(status, json.dumps({"code": status, "message": "refused"}).encode())
        elif (server.needs_token or self.headers.get("Authorization")) and not authorised:
            self.answer(401, b'{"code": 401, "message": "Unauthenticated"}')
        else:
            address = server.storage or server.address
            self.answer(302, b"", Location=f"{address}/storage/archive.zip")

    def do_GET(self):
        self.note()
        server, start = self.server, 0
        if server.storage_answers and (status := server.storage_answers.pop(0)) != 200:
            return self.answer(status, b"<html>expired</html>", "text/html")
        body = server.pages.pop(0) if server.pages else server.archive
        if self.headers.get("Range") and self.headers.get("If-Range") in (None, server.etag):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(body) > 0:
            return self.answer(416, b"")
        faults = server.cuts or server.stalls
        end, stalls = start + faults.pop(0) if faults else len(body), faults is server.stalls
        about = {"ETag": server.etag, "Last-Modified": "Mon, 03 Jun 2019 08:00:00 GMT"}
        about |= {"Accept-Ranges": "bytes", "Content-Length": str(len(body) - start)}
        self.answer(206 if start else 200, body[start:end], "application/zip", **about)
        self.wfile.flush()
        if end < len(body):
            if stalls:
                server.closing.wait(40)
            self.close_connection = True
            self.connection.close()


@contextlib.contextmanager
def serving(archive, **options):
    """A KaggleServer in a thread of its own."""
    with KaggleServer(archive, **options) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]).read_bytes()) as kaggle:
        home = Path("home").resolve()
        command = [sys.executable, *sys.argv[2:]]
        sys.exit(subprocess.run(command, env=kaggle.environment(home)).returncode)
