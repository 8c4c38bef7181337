"""Bridges between other libraries' models and data and a logging run."""
