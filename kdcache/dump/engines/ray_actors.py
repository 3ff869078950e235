"""Workers as actors of a Ray cluster: ``kdcache dump-teachers RECIPE --engine ray --address HOST:6379``.

There is an actor per GPU, or per share of the CPUs where the cluster has no GPU. Actors are made as nodes join. Ray
restarts an actor that died and gives it its piece again; where that is not possible the driver gives the piece to
another one. Only core actors are used: hidden states must not travel through Ray's object store.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.dump.engines.dispatch import DEPTH, Event, Key
from kdcache.dump.engines.messages import About, Failed
from kdcache.dump.engines.worker import Worker
from kdcache.errors import KdcacheError, RecipeError

if TYPE_CHECKING:
    from kdcache.dump.engines.cluster import Message
    from kdcache.dump.engines.messages import Job, Outcome

_ANSWER = 5.0  # seconds that an address has to answer
_LOOK = 2.0  # seconds between two looks for new nodes
_RESTARTS, _RETRIES = 4, 2  # of an actor, of a piece on it
_MOST = 10_000  # actors


@dataclass(frozen=True)
class RayEngine:
    """A Ray cluster. ``gpus`` None: one GPU per worker if the cluster has any; ``workers`` 0: as many as fit."""

    address: str | None = None  # None: Ray is started on this machine alone
    workers: int = 0
    cpus: float = 1.0  # of a worker
    gpus: float | None = None
    worker: type[Worker] = Worker

    @contextlib.contextmanager
    def pool(self, job: Job, message: Message) -> Iterator[_RayPool]:
        """Raises RecipeError if Ray is not installed, KdcacheError if the cluster does not answer or has no room."""
        ray = _import()
        own = not ray.is_initialized()
        with contextlib.redirect_stdout(sys.stderr):  # Ray reports workers that died on stdout, which is for results
            if own:
                _connect(ray, self.address)
            try:
                pool = _RayPool(ray, self, job, message)
                try:
                    yield pool
                finally:
                    pool.close()
            finally:
                if own:
                    ray.shutdown()


def check_engine(engine: RayEngine) -> None:
    """Whether Ray is installed and the address answers, before data and teachers are read. Raises as ``pool``."""
    _import()
    if engine.address:
        _check_answer(engine.address)


def _import() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            "--engine ray needs the package ray", "Install it with: pip install 'kdcache[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(
            address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
            logging_level="ERROR", configure_logging=False,
        )  # fmt: skip
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and others here
        raise _no_cluster(address, str(error)) from error


def _check_answer(address: str) -> None:
    """Try to connect: Ray itself waits for minutes. ``auto`` names no place."""
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RecipeError(f"--address is '{address[:80]}'; expected HOST:PORT or auto", "Such as: --address head:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str | None, reason: str) -> KdcacheError:
    first = (reason.strip().splitlines() or ["no reason given"])[0][:300]
    if address is None:
        return KdcacheError(f"Ray does not start on this machine: {first}", "Start a cluster, and name its --address.")
    return KdcacheError(
        f"no Ray cluster answers at '{address}': {first}",
        "Start one with 'ray start --head', and name its address: --address HOST:6379",
    )


class _RayPool:
    """Actors by name. A name is the worker's own once it is known."""

    def __init__(self, ray: Any, engine: RayEngine, job: Job, message: Message) -> None:
        self._ray, self._engine, self._message = ray, engine, message
        self._job = job  # by value: an actor whose arguments are in the object store cannot always be restarted
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, tuple[str, Key | None]] = {}
        self._bases: dict[str, Any] = {}
        self._made = self._refused = 0
        self._looked = -_LOOK
        self._room = 0
        nodes = self._nodes()
        has_gpus = any(node.get("GPU", 0) for node in nodes)
        self._gpus = engine.gpus if engine.gpus is not None else float(has_gpus)
        self._class = ray.remote(
            num_cpus=engine.cpus, num_gpus=self._gpus, max_restarts=_RESTARTS, max_task_retries=_RETRIES,
            max_concurrency=DEPTH,
        )(engine.worker)  # fmt: skip
        if not engine.workers and not self._places(nodes):
            gpus = f" and {self._gpus:g} GPUs" if self._gpus else ""
            raise KdcacheError(
                f"the Ray cluster has no node with {engine.cpus:g} CPUs{gpus}",
                "Ask for less with --worker-cpus and --worker-gpus, or add a node.",
            )

    def submit(self, worker: str, key: Key) -> None:
        work, bases = self._message(key)
        ref = self._actors[worker].do.remote(work, self._put(key.teacher, bases))
        self._pending[ref] = worker, key

    def wait(self, seconds: float) -> Sequence[Event]:
        self._grow()
        if not self._pending:
            time.sleep(min(seconds, 0.2))
            return []
        refs = list(self._pending)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [event for ref in ready if ref in self._pending for event in self._hear(ref)]

    def drop(self, worker: str) -> None:
        self._refused += 1
        self._forget(worker)

    def may_grow(self) -> bool:
        return bool(self._actors) or self._wanted() > 0

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._actors):
            self._forget(worker)

    def _hear(self, ref: Any) -> Iterator[Event]:
        worker, key = self._pending.pop(ref)
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._forget(worker)
            if key is None:  # it never started
                self._refused += 1
                yield Event(
                    worker, None, Failed("KdcacheError", f"does not start: {_reason(error)}", "", for_good=True)
                )
            else:
                yield Event(worker, key, None)
            return
        if isinstance(outcome, About):
            self._actors[outcome.name] = self._actors.pop(worker)
            worker = outcome.name
        yield Event(worker, key, outcome)

    def _grow(self) -> None:
        """Make actors where nodes have room that no actor of this dump was made for."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        self._room = self._places(self._nodes())
        for _ in range(self._wanted()):
            name = f"number {self._made}"
            self._made += 1
            self._actors[name] = self._class.remote(self._job)
            self._pending[self._actors[name].check.remote()] = name, None

    def _wanted(self) -> int:
        return max(0, min(self._engine.workers or self._room, _MOST) - self._refused - len(self._actors))

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _places(self, nodes: Sequence[Mapping[str, float]]) -> int:
        return sum(
            int(min(node.get("CPU", 0) / self._engine.cpus, node.get("GPU", 0) / self._gpus if self._gpus else _MOST))
            for node in nodes
        )

    def _put(self, teacher: str, bases: Mapping[int, bytes]) -> Any:
        """The bases in the object store, once per teacher."""
        if not bases:
            return None
        if teacher not in self._bases:
            self._bases[teacher] = self._ray.put(dict(bases))
        return self._bases[teacher]

    def _forget(self, worker: str) -> None:
        actor = self._actors.pop(worker, None)
        for ref in [ref for ref, (name, _) in self._pending.items() if name == worker]:
            del self._pending[ref]
        if actor is not None:
            with contextlib.suppress(Exception):  # it is dead already
                self._ray.kill(actor)


def _reason(error: Exception) -> str:
    """The last line that says something: Ray's messages end with the exception of the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:300]
