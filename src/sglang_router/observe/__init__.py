"""Listeners of `routing.events`: metrics, the access log, the log of worker changes. And the log writer."""
