"""An engine that only has health, ready in 40 ms: it answers every request with 200.

python -I -S tiny_engine.py PORT [FILE]      exits with status 3 if FILE does not exist
"""

import os
import socket
import sys

if len(sys.argv) > 2 and not os.path.exists(sys.argv[2]):
    print("cannot load the model", flush=True)
    sys.exit(3)

server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(f"listening on {sys.argv[1]}", flush=True)
while True:
    client = server.accept()[0]
    with client:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
