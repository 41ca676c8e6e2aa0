"""Sources that look for workers: Kubernetes, a file, DNS."""
