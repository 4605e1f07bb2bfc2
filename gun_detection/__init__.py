"""Gun detection in images: datasets, detector, training, evaluation, release and scoring.

The library knows nothing of Airflow; the DAGs and the command line call the same functions.
"""

import sys

from gun_detection.deferral import CompilerOnDemand

sys.meta_path.insert(0, CompilerOnDemand())

__version__ = "0.1.0"
