"""A stand-in for the dashboard of a Ray cluster, on loopback: its Jobs API, and the faults of a network."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Dashboard:
    """Ray's Jobs API as far as the client uses it. `faults` are taken one after the other, each by one request."""

    def __init__(self, port):
        self.jobs, self.submissions, self.faults, self.asked, self.alive = {}, [], [], [], 2
        self.token, self.gpus, self.log_chars, self.is_stubborn = "", 0, 1 << 24, False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def say(self, status, value):
                body = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path, self.headers.get("Authorization")))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "cut":  # before anything is done
                    self.close_connection = True
                    self.connection.close()
                    return
                if isinstance(fault, int):
                    self.say(fault, "busy")
                    return
                if outer.token and self.headers.get("Authorization") != f"Bearer {outer.token}":
                    self.say(401 if not self.headers.get("Authorization") else 403, "no")
                    return
                status, value = outer.answer(self.command, self.path, body)
                if fault == "lost":  # done, but nobody hears of it
                    self.close_connection = True
                    self.connection.close()
                    return
                self.say(status, value)

            do_GET = do_POST = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, method, path, body):
        name = path.split("/")[3] if path.count("/") > 2 else ""
        if path == "/api/version":
            return 200, {"ray_version": "2.60.0"}
        if path.startswith("/api/v0/nodes"):
            rows = [
                {
                    "node_id": f"n{i}",
                    "node_ip": f"10.0.0.{i}",
                    "is_head_node": i == 1,
                    "state": state,
                    "resources_total": {"CPU": 2.0, "GPU": float(self.gpus)},
                }
                for i, state in enumerate(["ALIVE"] * self.alive + ["DEAD"])
            ]
            return 200, {"data": {"result": {"result": rows}}}
        if method == "POST" and path == "/api/jobs/":
            wanted = json.loads(body)
            if wanted["submission_id"] in self.jobs:
                return (
                    500,
                    f"Traceback ...\nValueError: Job with submission_id {wanted['submission_id']} already exists.",
                )
            if "bad" in wanted["entrypoint"]:
                return 500, "Traceback (most recent call last):\n  File x\nValueError: no such runtime_env"
            self.submissions.append(wanted)
            self.jobs[wanted["submission_id"]] = {
                "status": "RUNNING",
                "message": "",
                "driver_exit_code": None,
                "logs": "",
                "metadata": wanted["metadata"],
            }
            return 200, {"submission_id": wanted["submission_id"]}
        if name not in self.jobs:
            return 404, "Job does not exist"
        if path.endswith("/logs"):
            return self.answer_log(self.jobs[name]["logs"])
        if path.endswith("/stop"):
            self.jobs[name]["status"] = "RUNNING" if self.is_stubborn else "STOPPED"
            return 200, {"stopped": True}
        if method == "DELETE":
            del self.jobs[name]
            return 200, {"deleted": True}
        return 200, {key: value for key, value in self.jobs[name].items() if key != "logs"}

    def answer_log(self, said):
        """Ray reads a log as UTF-8, and newer ones tell its end only."""
        try:
            text = said.decode() if isinstance(said, bytes) else said
        except UnicodeDecodeError as error:
            return 500, f"Traceback ...\nUnicodeDecodeError: {error}"
        if len(text) > self.log_chars:
            text = "[LOG TRUNCATED \u2014 the last bytes]\n" + text[-self.log_chars :].partition("\n")[2]
        return 200, {"logs": text}
