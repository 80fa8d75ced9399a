"""Hosts: what a model must tell the toolkit, and the models that do."""
