"""Finding out what a bucket holds: paging through it beside reading its inventory.

    python benchmarks/inventory.py [--keys N] [--objects N]

Lists `--objects` real objects of SeaweedFS through our paging, then reads lists of `--keys` keys, a
gzipped CSV and a Parquet file, from the same kind of server. Prints seconds for a million keys,
those of the processor of this process among them, the size of the lists, and the ratios. Paging
through a bucket that is further away takes longer.
"""

import argparse
import csv
import gzip
import os
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from planning import Listing, list_really
from pyarrow import parquet

from embedded.servers import make_bucket, temporary_servers
from gun_detection.scoring.inventory import read_inventory
from gun_detection.settings import load_settings
from gun_detection.storage import Storage

COLUMNS = ("key", "size", "etag", "last_modified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--objects", type=int, default=20_000)
    arguments = parser.parse_args()
    paging = 1000 * list_really(arguments.objects)
    print(f"paging      {paging:7.1f} s for a million keys")
    with temporary_servers() as servers, tempfile.TemporaryDirectory() as name:
        os.environ |= servers.variables("postgres", "data", "uploads")
        storage = Storage(load_settings())
        make_bucket(storage, "data")
        for file in _write(Path(name), arguments.keys):
            storage.put_file("data", file.name, file)
            start, cpu = time.perf_counter(), time.process_time()
            found = sum(1 for _ in read_inventory(storage, f"s3://data/{file.name}"))
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            assert found == arguments.keys
            million = 1_000_000 / arguments.keys
            print(
                f"{file.name:12s}{seconds * million:7.1f} s for a million keys, of which CPU "
                f"{cpu * million:.1f} s; {file.stat().st_size / arguments.keys:.0f} bytes a key; "
                f"{paging / seconds / million:.1f} times as fast as paging"
            )


def _write(folder: Path, keys: int) -> list[Path]:
    """The same list in both forms."""
    rows = [
        (item.key, item.size, item.etag, item.last_modified) for item in Listing(keys, 0).objects()
    ]
    text, table = folder / "list.csv.gz", folder / "list.parquet"
    with gzip.open(text, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((key, size, etag, moment.isoformat()) for key, size, etag, moment in rows)
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pa.table(columns), table)
    return [text, table]


if __name__ == "__main__":
    main()
