"""Hold the nodes of a Ray cluster and run a trainer's launcher on each, as one job: one that ends ends all.

    python ray_driver.py ray_job.json -> placement group -> an actor a node -> bash node.sh (torchrun) -> output.log

Its text is copied into the job's folder and run there by the cluster's own Python, which has ray and nothing of ours.
The job ends with torchrun's exit status, or LOST_NODE when a node is lost; other ends that it knows itself are written
down in failure.json, as a trainer does.

Ring: edge (runs on the cluster; needs Ray and the standard library only).  Units: seconds.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LOST_NODE, TOLD_TO_STOP = 69, 143
DRIVER = "driver"  # in failure.json: no rank wrote it
_TICK_S = 0.5
_SAY_EVERY_S = 60.0
_KILLED_S = 10.0  # from the signal to the end of what was killed


class JobError(Exception):
    """An end that the driver explains. `kind` is one of our errors; "" for one that its exit status tells."""

    def __init__(self, kind: str, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


class Node:
    """One node of the job; an actor whose calls return at once. Its launcher ends with it."""

    def __init__(self, plan: dict[str, Any], number: int) -> None:  # Any: JSON values
        self.plan, self.number, self.folder = plan, number, Path(plan["folder"])
        self.child: Any = None  # Popen
        self.lock = self.offset = 0

    def look(self) -> dict[str, Any]:  # Any: JSON values
        """Show that the folder is seen; return where this is, and which variables are not set."""
        import ray  # type: ignore[import-not-found]  # it lives in another environment

        is_seen = (self.folder / "job.json").is_file()
        if is_seen:
            (self.folder / "nodes").mkdir(exist_ok=True)
            (self.folder / "nodes" / str(self.number)).write_text(self.plan["job_id"] + "\n")
        lacking = [name for name in self.plan["needs"] if not os.environ.get(name)]
        address = ray.util.get_node_ip_address()
        return {"address": address, "host": socket.gethostname(), "is_seen": is_seen, "lacking": lacking}

    def find_port(self, first: int) -> int:
        """Return the first free port from `first` on."""
        for port in range(first, first + 100):
            with contextlib.suppress(OSError), socket.socket() as one:
                one.bind(("", port))
                return port
        return first

    def start(self, variables: dict[str, str]) -> bool:
        """Start the launcher; False while that of an earlier job still ends in this folder."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        self.lock = os.open(locks / str(self.number), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            return False
        except OSError:
            pass  # storage without locks
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours.pop("OMP_NUM_THREADS", None)  # Ray's number is that of the launcher's CPUs
        env = {**ours, **variables, "TATARA_NODE": str(self.number)}
        bound = [sys.executable, "-I", "-S", self.plan["binder"], f"{os.getpid()}:{int(signal.SIGTERM)}"]
        self.log = Path(variables["TATARA_LOGS"]) / f"{self.number}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(
                [*bound, "bash", str(self.folder / "node.sh")],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[self.lock],
            )
        os.close(self.lock)  # the launcher's alone from here
        return True

    def poll(self) -> tuple[str, Any]:
        """Return whole new lines, and the launcher's exit status when it has ended."""
        code = None if self.child is None else self.child.poll()
        if self.child is None:
            return "", 0
        with self.log.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read()
        end = len(data) if code is not None else data.rfind(b"\n") + 1
        self.offset += end
        return data[:end].decode(errors="replace"), code if code is None or code >= 0 else 128 - code

    def stop(self, number: int) -> None:
        """Send a signal to the launcher, which passes SIGTERM on to its ranks; SIGKILL to each rank as well."""
        if self.child is None or self.child.poll() is not None:
            return
        ranks = find_descendants(self.child.pid) if number == signal.SIGKILL else []  # in sessions of their own
        self.child.send_signal(number)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def find_descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that these started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


class Driver:
    """The job: what it says goes to Ray's log and to output.log."""

    def __init__(self, plan: dict[str, Any]) -> None:  # Any: JSON values
        self.plan, self.folder, self.is_told = plan, Path(plan["folder"]), False
        self.ray: Any = None  # the module
        self.actors: list[Any] = []  # ray's handles
        self.codes: dict[int, int] = {}
        self.lost: list[Exception] = []  # what ray said of actors that do not answer any more
        self.output = (self.folder / "output.log").open("ab")

    def say(self, text: str) -> None:
        """Write lines, as UTF-8 whatever the head's locale is: Ray reads its log so."""
        if text:
            data = (text if text.endswith("\n") else text + "\n").encode(errors="replace")
            for one in (self.output, sys.stdout.buffer):
                one.write(data)
                one.flush()

    def run(self) -> int:
        """Return the job's exit status."""
        import ray  # type: ignore[import-not-found]  # as above

        self.ray = ray
        ray.init(logging_level="ERROR", log_to_driver=False)
        signal.signal(signal.SIGTERM, self._obey)  # after ray's own
        try:
            self._reserve()
            if not self.is_told:
                self._start(self._look())
            code = self._follow()
        except ray.exceptions.RayError as error:
            raise explain(error, self.plan["meanings"]) or error from None
        finally:
            self._end()
        if code and self.lost:  # also where the ranks that are left noticed it first
            raise explain(self.lost[0], self.plan["meanings"]) or self.lost[0]
        return code

    def _obey(self, number: int, frame: Any) -> None:
        self.is_told = True

    def _reserve(self) -> None:
        from ray.util.placement_group import placement_group  # type: ignore[import-not-found]
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # type: ignore[import-not-found]

        bundle, count = self.plan["bundle"], self.plan["nodes"]
        each = ", ".join(f"{value:g} {name}" for name, value in bundle.items())
        group = placement_group([bundle] * count, strategy="STRICT_SPREAD")
        ready, since, said = group.ready(), time.monotonic(), 0.0
        while not self.is_told and not self.ray.wait([ready], timeout=_TICK_S)[0]:
            waited = time.monotonic() - since
            if waited > self.plan["reserve_timeout_s"]:
                free = self.ray.available_resources()
                raise JobError(
                    "CapacityError",
                    f"the cluster did not give {count} nodes with {each} each within {waited:.0f} s (free now: "
                    f"{', '.join(f'{free.get(name, 0):g} {name}' for name in bundle)}): free them, ask for less in "
                    "TrainSpec.launch, or raise its reserve_timeout_s",
                )
            if waited >= said:
                self.say(f"tatara: waits for {count} nodes with {each} each")
                said = waited + _SAY_EVERY_S
        if self.is_told:
            return
        kind = self.ray.remote(Node)
        for number in range(count):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            shares = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
            self.actors.append(kind.options(scheduling_strategy=place, **shares).remote(self.plan, number))

    def _look(self) -> list[dict[str, Any]]:
        nodes = self.ray.get([actor.look.remote() for actor in self.actors])
        faults = [f"{node['host']} ({node['address']})" for node in nodes if not node["is_seen"]]
        if faults:
            raise JobError(
                "SpecError",
                f"{', '.join(faults)} does not see {self.folder}: put TATARA_HOME, this checkout and its Python on "
                "storage that every node mounts at the same path",
            )
        faults = [f"{node['host']} has no {', '.join(node['lacking'])}" for node in nodes if node["lacking"]]
        if faults:
            raise JobError("SpecError", f"{'; '.join(faults)} set: set it there before `ray start`")
        return nodes

    def _start(self, nodes: list[dict[str, Any]]) -> None:
        first = self.plan["port"] or self.ray.get(self.actors[0].find_port.remote(self.plan["first_port"]))
        variables = {
            "TATARA_HEAD": f"{self.plan['address'] or nodes[0]['address']}:{first}",
            "TATARA_RUN": self.plan["job_id"],
            "TATARA_LOGS": str(self.folder / "logs" / self.plan["job_id"]),
        }
        deadline = time.monotonic() + 2 * self.plan["grace_s"] + 60
        for actor, node in zip(self.actors, nodes, strict=True):
            variables["TATARA_ADDRESS"] = node["address"]  # its host name the others may not know, as with pods
            while not self.is_told and not self.ray.get(actor.start.remote(variables)):
                if time.monotonic() > deadline:
                    raise JobError("TransientError", f"an earlier job's processes still run in {self.folder}")
                time.sleep(_TICK_S)
        self.say(f"{self.plan['starts']}{self.plan['job_id']} on {', '.join(node['host'] for node in nodes)}")

    def _follow(self) -> int:
        """Return the status of the launcher that ended first in failure, 0 when all ended well."""
        while len(self.codes) < len(self.actors):
            self._poll()
            if self.is_told or any(self.codes.values()):
                break
            time.sleep(_TICK_S)
        return next((code for code in self.codes.values() if code), TOLD_TO_STOP if self.is_told else 0)

    def _poll(self) -> None:
        """Hand on what each launcher says. One whose actor is dead ended with its node, and hides no other's end."""
        for number, answer in enumerate([actor.poll.remote() for actor in self.actors]):
            try:
                text, code = self.ray.get(answer)
            except self.ray.exceptions.RayError as error:
                if number not in self.codes:
                    self.codes[number] = LOST_NODE
                    self.lost.append(error)
                continue
            self.say(text)
            if code is not None:
                self.codes.setdefault(number, code)

    def _end(self) -> None:
        """End the launchers that still run, and hand on what they say: torchrun's list of who failed, with luck."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for number, patience_s in ((signal.SIGTERM, self.plan["grace_s"]), (signal.SIGKILL, _KILLED_S)):
                deadline = time.monotonic() + patience_s
                for actor in self.actors:
                    actor.stop.remote(int(number))
                while len(self.codes) < len(self.actors) and time.monotonic() < deadline:
                    self._poll()
                    time.sleep(_TICK_S)
            self._poll()


def explain(error: Exception, meanings: dict[str, list[str]]) -> JobError | None:
    """Return what an error of Ray's means for the job; None for one that only its traceback tells."""
    said = " ".join(" ".join(str(error).split("\n")[:3]).split())[:500]  # what follows are hints on Ray itself
    found = next((meanings[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in meanings), None)
    return JobError(found[0], f"{found[1]} ({said})", 1 if found[0] else LOST_NODE) if found else None


def main(path: str) -> int:
    """Run the job; whatever ends it is in output.log."""
    plan = json.loads(Path(path).read_text())
    driver = Driver(plan)
    driver.say(f"{plan['begins']}{plan['job_id']}")
    (driver.folder / "nodes").mkdir(exist_ok=True)
    (driver.folder / "nodes" / "driver").write_text(plan["job_id"] + "\n")  # from here on all is told in the folder
    try:
        return driver.run()
    except JobError as error:
        driver.say(f"tatara: {error}")
        if error.kind:
            told = {"error": error.kind, "message": str(error), "by": DRIVER}
            (driver.folder / "failure.json").write_text(json.dumps(told))
        return error.status
    except Exception:  # noqa: BLE001 - ray's own, of whatever kind
        driver.say(traceback.format_exc())
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
