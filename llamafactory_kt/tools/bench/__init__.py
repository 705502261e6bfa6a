"""Measurements; one file a thing measured."""
