"""How long the scheduler parses each DAG file, against a file that imports the detector.

    python benchmarks/parse.py

Each file is parsed in a fresh process that has Airflow loaded, as the DAG processor has.
"""

import subprocess
import sys
from pathlib import Path

DAGS = Path(__file__).resolve().parent.parent / "dags"
PLUGINS = DAGS.parent / "plugins"

_PARSE = """
import sys, time, warnings
warnings.simplefilter("ignore")
import airflow.sdk
airflow.sdk.Asset("any", uri="any://thing")
sys.path[:0] = {folders!r}
start = time.perf_counter()
exec(compile({source!r}, "file", "exec"))
print(time.perf_counter() - start)
"""


def seconds(source: str) -> float:
    code = _PARSE.format(folders=[str(DAGS), str(PLUGINS)], source=source)
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def main() -> None:
    heavy = seconds("import torch, torchvision, cv2")
    print(f"{'torch, torchvision and cv2 at the top':40s} {heavy:6.2f} s")
    for file in sorted(DAGS.glob("*.py")):
        taken = seconds(file.read_text())
        print(f"{file.name:40s} {taken:6.2f} s   ratio {taken / heavy:.3f}")


if __name__ == "__main__":
    main()
