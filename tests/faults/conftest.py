"""Runs to disturb, made as in the tests of scoring."""

from tests.scoring.conftest import champion, engine, plan, surveyed

__all__ = ["champion", "engine", "plan", "surveyed"]
