#!/bin/sh
# Runs once, when the data folder is new: one role and one database each, closed to the other.
set -eu

psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    --set airflow_password="$AIRFLOW_DB_PASSWORD" \
    --set library_password="$LIBRARY_DB_PASSWORD" <<'SQL'
CREATE ROLE airflow LOGIN PASSWORD :'airflow_password';
CREATE DATABASE airflow OWNER airflow;
REVOKE ALL ON DATABASE airflow FROM PUBLIC;
CREATE ROLE gun_detection LOGIN PASSWORD :'library_password';
CREATE DATABASE gun_detection OWNER gun_detection;
REVOKE ALL ON DATABASE gun_detection FROM PUBLIC;
SQL
