"""Several processes that serve one address (`--workers`): a supervisor, its workers, and one admin listener over all."""
