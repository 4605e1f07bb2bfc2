"""Gun detection in images: datasets, detector, training, evaluation, release and scoring.

The library knows nothing of Airflow; the DAGs and the command line call the same functions.
"""

__version__ = "0.1.0"
