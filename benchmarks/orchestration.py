"""What Airflow costs in a run over 10,000 pictures, with an engine that only waits.

    python benchmarks/orchestration.py [--pictures N] [--seconds S] [--streams N] [--tasks N]
                                       [--shard-images N]

A picture takes `--seconds` of waiting, of `--streams` at once in each of `--tasks` shards at once:
by default as long as 0.1 CPU-seconds a picture take two cores. All else is real, in a whole
platform with the LocalExecutor. Orchestration is all of the run's time but what the pipelines
would take with that many at once and nothing between them: listing, planning, starting tasks and
the processes that score, ending them, and closing the run. Prints its share and where it goes, and
the CPU seconds of every process of the platform.
"""

import argparse

from simulation import Run, check, run, simulated_platform, upload

from embedded.airflow import COMPONENTS, LOG_SERVER
from gun_detection.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.2, help="that a picture takes")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=2)
    fields = Settings.model_fields
    parser.add_argument("--shard-images", type=int, default=fields["shard_images"].default)
    arguments = parser.parse_args()
    variables = {
        "GUN_DETECTION_SCORING_TASKS": str(arguments.tasks),
        "GUN_DETECTION_SHARD_IMAGES": str(arguments.shard_images),
    }
    with simulated_platform(arguments.seconds, arguments.streams, variables) as simulation:
        upload(simulation, "first/", 2 * arguments.tasks)
        run(simulation, "first/")
        upload(simulation, "run/", arguments.pictures)
        before, shards_before = simulation.cpu(), simulation.shard_cpu()
        done = run(simulation, "run/")
        after, shards = simulation.cpu(), simulation.shard_cpu() - shards_before
        used = {name: seconds - before[name] for name, seconds in after.items()}
        ledger = check(simulation, "run/", arguments.pictures)
    at_once = arguments.streams * arguments.tasks
    ideal = arguments.pictures * arguments.seconds / at_once
    print(
        f"{ledger}; {len(done.shards)} shards, {arguments.tasks} at once with "
        f"{arguments.streams} streams of {arguments.seconds:g} s a picture: {ideal:.0f} s"
    )
    _print_time(done, arguments.tasks)
    _print_cpu(used, shards, arguments.pictures)


def _print_time(done: Run, tasks: int) -> None:
    pipelines = done.pipelines / tasks
    starting = sum(shard.began - shard.task_began for shard in done.shards)
    ending = sum(shard.task_ended - shard.ended for shard in done.shards)
    scoring = done.last - done.first
    between = scoring * tasks - done.pipelines - starting - ending
    print(
        f"run          {done.seconds:7.1f} s\n"
        f"pipelines    {pipelines:7.1f} s   {done.pipelines / len(done.shards):.1f} s a shard\n"
        f"orchestration{done.seconds - pipelines:7.1f} s   "
        f"{100 * (1 - pipelines / done.seconds):.1f} % of the run\n"
        f"  before the first shard {done.first:6.1f} s, after the last "
        f"{done.seconds - done.last:.1f} s\n"
        f"  a shard: from its task's start to its pipeline's {starting / len(done.shards):.1f} s, "
        f"to its task's end {ending / len(done.shards):.1f} s, "
        f"without a task {between / len(done.shards):.1f} s"
    )


def _print_cpu(used: dict[str, float], shards: float, pictures: int) -> None:
    airflow = sum(used[name] for name in (*COMPONENTS, LOG_SERVER)) - shards
    rows = {"Airflow and its tasks": airflow, "processes that score": shards}
    rows |= {name: used[name] for name in ("postgres", "seaweedfs")}
    for name, seconds in rows.items():
        print(f"CPU {name:22s}{seconds:7.1f} s {1000 * seconds / pictures:6.2f} ms a picture")
    for name in (*COMPONENTS, LOG_SERVER):
        print(f"      {name:20s}{used[name]:7.1f} s")


if __name__ == "__main__":
    main()
