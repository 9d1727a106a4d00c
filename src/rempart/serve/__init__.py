"""The service: an HTTP API, durable jobs, and pages, in one data directory."""
