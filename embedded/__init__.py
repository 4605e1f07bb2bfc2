"""The whole platform on one machine without containers: `python -m embedded up`.

SeaweedFS, PostgreSQL, Airflow and TensorBoard run under one supervisor, on loopback only,
with everything that they write in one folder (`.platform/`, or `PLATFORM_DIR`).
"""
