"""HTTP/1.1 without I/O: bytes in, facts out. Imports no asyncio, socket, time or logging."""
