"""One run with 1, 2 and 4 Celery workers, on a real Airflow with an engine that only waits.

    python benchmarks/workers.py [--workers N …] [--shards N] [--pictures N] [--seconds S]

Scores the same number of new pictures with each number of workers, one task at a time each, over
Redis (`redis-server` has to be installed). A picture takes `--seconds` of waiting instead of
computing, so that the workers of several machines find room on one; all else is real and shares
its cores. Prints the time from the first scoring task's start to the last one's end, the whole
run's, the speed-ups against the first number of workers, and what the ledger holds.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from simulation import Run, Simulation, check, run, simulated_platform, upload

from embedded.config import HOST, Ports
from embedded.processes import Service, start_service, stop_service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=1600, help="of a whole run")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a picture takes")
    arguments = parser.parse_args()
    each, pictures = arguments.pictures // arguments.shards, arguments.pictures
    variables = {
        "GUN_DETECTION_SHARD_IMAGES": str(each),
        "GUN_DETECTION_SCORING_TASKS": str(max(arguments.workers)),
    }
    print(
        f"{pictures:,} pictures in {arguments.shards} shards, {arguments.seconds:g} s each and "
        f"one at a time: {each * arguments.seconds:.0f} s a shard",
        flush=True,
    )
    with (
        redis() as broker,
        simulated_platform(arguments.seconds, 1, variables, broker) as simulation,
    ):
        first = None
        for count in arguments.workers:
            prefix = f"workers-{count}/"
            upload(simulation, prefix, pictures)
            with workers(simulation, count):
                done = run(simulation, prefix)
            first = first or done
            _print(count, done, first, check(simulation, prefix, pictures))


@contextmanager
def redis() -> Iterator[str]:
    """The URL of a broker that keeps nothing."""
    program, port = shutil.which("redis-server"), Ports.free().airflow
    assert program is not None, "install redis-server"
    with tempfile.TemporaryDirectory(prefix="gun-detection-redis-") as folder:
        options = {"bind": HOST, "port": str(port), "save": "", "appendonly": "no", "dir": folder}
        command = [
            program,
            *(part for name, value in options.items() for part in (f"--{name}", value)),
        ]
        service = Service("redis", tuple(command), {}, directory=Path(folder))
        process = start_service(service, Path(folder))
        try:
            yield f"redis://{HOST}:{port}/0"
        finally:
            stop_service(service, process)


@contextmanager
def workers(simulation: Simulation, count: int) -> Iterator[None]:
    """So many Celery workers, ready for tasks."""
    with ExitStack() as stack:
        names = [f"worker-{number}-of-{count}" for number in range(1, count + 1)]
        for name in names:
            service = Service(
                name,
                (
                    *(sys.executable, "-m", "airflow", "celery", "worker", "--concurrency", "1"),
                    *(
                        "--celery-hostname",
                        f"{name}@%h",
                        "--pid",
                        f"{simulation.folder}/{name}.pid",
                    ),
                    "--skip-serve-logs",
                ),
                simulation.stack.environment,
                directory=simulation.folder,
            )
            stack.callback(stop_service, service, start_service(service, simulation.folder))
        deadline = time.monotonic() + 120
        while not all(_ready(simulation.folder / f"{name}.log") for name in names):
            assert time.monotonic() < deadline, f"the workers in {simulation.folder} do not start"
            time.sleep(0.5)
        yield


def _ready(log: Path) -> bool:
    return " ready." in log.read_text(errors="replace")


def _print(count: int, done: Run, first: Run, ledger: str) -> None:
    shards = len(done.shards)
    scoring, before = done.last - done.first, first.last - first.first
    tasks = sum(shard.task_ended - shard.task_began for shard in done.shards)
    print(
        f"{count} workers: scoring {scoring:6.1f} s, speed-up {before / scoring:.2f}; run "
        f"{done.seconds:6.1f} s, {first.seconds / done.seconds:.2f}; a shard's task "
        f"{tasks / shards:.1f} s, of which its pipeline {done.pipelines / shards:.1f} s\n"
        f"           {ledger}",
        flush=True,
    )


if __name__ == "__main__":
    main()
