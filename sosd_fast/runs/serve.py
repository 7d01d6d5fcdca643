"""The report of a run on localhost, made anew at each reload."""

import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sosd_fast.runs.records import load
from sosd_fast.runs.report import write_report


def make_server(run_dirs: Sequence[str | Path], port: int = 0) -> ThreadingHTTPServer:
    """Makes a server of the report that answers to this machine alone; its `serve_forever` serves it.

    Args:
        run_dirs: run directories.
        port: on 127.0.0.1; 0 takes a free one.

    Returns:
        The server, with `server_port`.

    Raises:
        ValueError: no run directory.
        OSError: the port is taken.
    """
    for run_dir in run_dirs:
        load(run_dir)
    drawing = threading.Lock()
    hosts: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            """Answers / with the report."""
            if self.headers.get("Host") not in hosts:  # a page elsewhere that has its own name lead here
                return self.send_error(403)
            if self.path != "/":
                return self.send_error(404)
            try:
                with drawing, tempfile.TemporaryDirectory() as folder:
                    page = write_report(run_dirs, Path(folder) / "report.html").read_bytes()
            except (ValueError, ImportError, OSError) as error:
                return self.send_error(500, explain=str(error))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format, *args):
            """Says nothing of each request."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hosts.update(f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    return server


def serve(run_dirs: Sequence[str | Path], port: int = 0):
    """Serves the report on localhost until ctrl-C; see `make_server`."""
    with make_server(run_dirs, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows the report, anew at each reload. ctrl-C ends.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
