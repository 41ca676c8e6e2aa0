"""The endpoint picker: tells a gateway, over gRPC, which worker each of its requests goes to (`sglang-router epp`)."""
