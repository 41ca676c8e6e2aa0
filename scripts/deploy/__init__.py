"""What scripts/test-deploy runs: one module for each way to deploy the router."""
