"""The service: what the command line does, behind an API and pages in a browser."""
