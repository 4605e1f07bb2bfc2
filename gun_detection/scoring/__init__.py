"""Scoring: plan what has no outcome yet, run the detector over it, write the ledger."""
