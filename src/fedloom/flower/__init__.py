"""Clients on other machines: the coordinator and its nodes, with Flower between them."""
