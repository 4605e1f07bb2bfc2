"""Reading many small objects: `Reader` beside boto3 (`Storage.get`) and obstore, on one server.

    python benchmarks/reading.py [--objects N] [--kilobytes N] [--threads N] [--passes N]

Random bytes on an embedded SeaweedFS, read whole and only if their ETag is the listed one. Prints
objects a second and CPU milliseconds an object in this process, best of the alternating passes,
and their ratio to boto3. Only `Reader` checks the MD5 of what it reads: its share of the CPU is
printed, too. obstore takes part where it is installed.
"""

import argparse
import hashlib
import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from embedded.servers import make_bucket, temporary_servers
from gun_detection.reading import Reader
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage, StoredObject

Read = Callable[[StoredObject], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--kilobytes", type=int, default=180)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    content = os.urandom(1000 * arguments.kilobytes)
    with temporary_servers() as servers:
        os.environ |= servers.variables("postgres", "data", "uploads")
        settings = load_settings()
        storage = Storage(settings)
        make_bucket(storage, "uploads")
        for number in range(arguments.objects):
            storage.put("uploads", f"{number % 100:02d}/{number}.jpg", content)
        objects = list(storage.list_objects("uploads"))
        print(f"{len(objects)} objects of {arguments.kilobytes} kB, {arguments.threads} threads")
        compare(clients(settings), objects, arguments.threads, arguments.passes)
    start = time.process_time()
    for _ in objects:
        hashlib.md5(content, usedforsecurity=False).hexdigest()
    print(f"MD5 alone {(time.process_time() - start) / len(objects) * 1000:31.2f} ms CPU an object")


def clients(settings: Settings) -> dict[str, Read]:
    storage, reader = Storage(settings), Reader(settings)
    limit = settings.max_image_bytes
    found: dict[str, Read] = {
        "boto3": lambda o: storage.get(o.bucket, o.key, max_bytes=limit, etag=o.etag)
    }
    if importlib.util.find_spec("obstore"):
        found["obstore"] = obstore_client(settings)
    found["Reader"] = lambda o: reader.get(o.bucket, o.key, max_bytes=limit, etag=o.etag)
    return found


def obstore_client(settings: Settings) -> Read:
    import obstore
    from obstore.store import S3Store

    assert settings.s3_endpoint_url
    assert settings.s3_access_key_id
    assert settings.s3_secret_access_key
    store = S3Store(
        "uploads",
        endpoint=settings.s3_endpoint_url,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return lambda o: (
        obstore.get(store, o.key, options={"if_match": f'"{o.etag}"'}).bytes().to_bytes()
    )


def compare(
    readers: dict[str, Read], objects: list[StoredObject], threads: int, passes: int
) -> None:
    wall, cpu = dict.fromkeys(readers, 1e9), dict.fromkeys(readers, 1e9)
    for _ in range(passes):
        for name, read in readers.items():
            started, busy = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(threads) as pool:
                total = sum(len(data) for data in pool.map(read, objects))
            assert total == sum(item.size for item in objects)
            wall[name] = min(wall[name], time.perf_counter() - started)
            cpu[name] = min(cpu[name], time.process_time() - busy)
    for name in readers:
        print(
            f"{name:8s} {len(objects) / wall[name]:5.0f} objects/s, "
            f"ratio {wall['boto3'] / wall[name]:4.1f}; "
            f"{1000 * cpu[name] / len(objects):5.2f} ms CPU an object, "
            f"ratio {cpu['boto3'] / cpu[name]:4.1f}"
        )


if __name__ == "__main__":
    main()
