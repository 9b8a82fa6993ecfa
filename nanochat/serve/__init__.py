"""Serving: prompts that fit, the worker that batches requests, and the HTTP interface."""
