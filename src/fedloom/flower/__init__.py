"""Engines run clients, wherever they are: in this process, or on other machines."""
