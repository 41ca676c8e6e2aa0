"""Listeners of `core.events`: metrics, logs, the access line."""
