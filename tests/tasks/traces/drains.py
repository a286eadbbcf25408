"""Start drains in processes of their own, quickly: one process imports everything, each drain is a fork of it.

`python drains.py KIND PLACE WEAVE_URL LOCK_S`: a line on stdin starts a drain; answers "pid N", then "ended STATUS".
Exit status of a drain: 0 drained, 3 busy, 4 partial, 5 away (a transient error).
"""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import redis

from tasks.errors import TransientError
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue
from tasks.traces.run import drain_traces
from tasks.traces.spec import DrainSpec
from tasks.traces.weave_sink import WeaveSink

STATUS = {"drained": 0, "busy": 3, "partial": 4}
STATUS_AWAY = 5
SPEC = DrainSpec(batch_records=20, grace_s=0.15, request_timeout_s=0.4, attempts=6)


def drain(kind, place, url, lock_s):
    random.seed()
    queue = FileQueue(Path(place)) if kind == "file" else RedisQueue(redis.Redis(port=int(place)), lock_s=lock_s)
    sink = WeaveSink(httpx.Client(base_url=url), "team/tatara", SPEC)
    try:
        return STATUS[drain_traces(queue, sink, SPEC).status]
    except TransientError:
        return STATUS_AWAY


def main():
    kind, place, url, lock_s = sys.argv[1:]
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(drain(kind, place, url, float(lock_s)))
        sys.stdout.write(f"pid {pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


class Drains:
    """The test's side: start a drain, kill it or wait for it."""

    def __init__(self, kind, place, url, root, lock_s=0.3):
        argv = [sys.executable, __file__, kind, str(place), url, str(lock_s)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._watch = threading.Timer(120, self._process.kill)
        self._watch.start()

    def start(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline().split()[1])

    def wait(self):
        return int(self._process.stdout.readline().split()[1])

    def run_to_end(self):
        """Drain again until nothing is left, as the schedule does: on busy cores a request may time out."""
        for _ in range(10):
            self.start()
            if (status := self.wait()) != STATUS_AWAY:
                break
        return status

    def close(self):
        self._watch.cancel()
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


if __name__ == "__main__":
    main()
