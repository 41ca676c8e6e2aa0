"""Tell the other routers of a fleet what this one knows, and hear what they know, through a Valkey or Redis."""
