"""Sockets: the only folder with asyncio."""
