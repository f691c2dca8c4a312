"""Clients trained by many workers over Ray: actors on one machine or a cluster, each with a base of its own."""
