"""What `scripts/test-kubernetes` needs: a real API server, pods, a link that can be broken, and routers."""
